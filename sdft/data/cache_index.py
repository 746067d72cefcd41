"""Where the entries of a cache lie, by address: a few arrays, however many there are.

Knows positions and kinds; opens no file.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import torch

from sdft.data.packed_strings import SearchableStrings


class TensorKind(NamedTuple):
    """What many entries have in common."""

    size: int
    """in bytes"""
    dtype: torch.dtype
    shape: tuple[int, ...]


class CacheEntry(NamedTuple):
    """Of one entry."""

    shard: int
    first: int
    """byte of the shard"""
    kind: TensorKind
    checksum: int


class CacheIndex:
    """Entries in the order in which they were added."""

    def __init__(self) -> None:
        self._addresses = SearchableStrings()
        self._shards, self._firsts = array("i"), array("q")
        self._kinds, self._checksums = array("i"), array("Q")
        self._all_kinds: list[TensorKind] = []

    def __len__(self) -> int:
        return len(self._addresses)

    def add(self, address: str, place: CacheEntry) -> None:
        self._addresses.append(address)
        self._shards.append(place.shard)
        self._firsts.append(place.first)
        if place.kind not in self._all_kinds:
            self._all_kinds.append(place.kind)  # of any one model there are a few
        self._kinds.append(self._all_kinds.index(place.kind))
        self._checksums.append(place.checksum)

    def row(self, address: str) -> int | None:
        """The number of an entry; None where there is none of this address."""
        return self._addresses.find(address)

    def __getitem__(self, row: int) -> CacheEntry:
        kind = self._all_kinds[self._kinds[row]]
        return CacheEntry(self._shards[row], self._firsts[row], kind, self._checksums[row])
