"""Options of `python -m sdft.data` that belong to no class: their types are checked like those of constructors."""

from __future__ import annotations

from dataclasses import dataclass

from sdft.types import Count, Positive


@dataclass
class Place:
    """Where a command writes. out: a folder."""

    out: str


@dataclass
class ShardJob:
    """Options of `shard`. per_shard: samples of a shard at most. most_gb: size of a shard, in 10^9 bytes."""

    out: str
    per_shard: Count
    most_gb: Positive
