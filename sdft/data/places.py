"""Where the entries of a cache lie, by address: a few arrays, however many there are.

Knows positions and kinds; opens no file.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from sdft.data.packed import Strings


class Kind(NamedTuple):
    """What many entries have in common."""

    size: int
    """in bytes"""
    dtype: torch.dtype
    shape: tuple[int, ...]


class Place(NamedTuple):
    """Of one entry."""

    shard: int
    first: int
    """byte of the shard"""
    kind: Kind
    checksum: int


class Places:
    """Entries in the order in which they were added."""

    def __init__(self) -> None:
        self._addresses = Strings()
        self._shards, self._firsts = array("i"), array("q")
        self._kinds, self._checksums = array("i"), array("Q")
        self._all_kinds: list[Kind] = []
        self._by_mark: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._addresses)

    def add(self, address: str, place: Place) -> None:
        self._addresses.append(address)
        self._shards.append(place.shard)
        self._firsts.append(place.first)
        if place.kind not in self._all_kinds:
            self._all_kinds.append(place.kind)  # of any one model there are a few
        self._kinds.append(self._all_kinds.index(place.kind))
        self._checksums.append(place.checksum)
        self._by_mark = None

    def row(self, address: str) -> int | None:
        """The number of an entry; None where there is none of this address."""
        if self._by_mark is None:
            marks = np.fromiter(map(mark, self._addresses), np.uint64, len(self))
            order = np.argsort(marks)
            self._by_mark = marks[order], order
        marks, order = self._by_mark
        sought = mark(address)
        at = int(np.searchsorted(marks, np.uint64(sought)))
        while at < len(marks) and marks[at] == sought:
            if self._addresses[int(order[at])] == address:
                return int(order[at])
            at += 1
        return None

    def __getitem__(self, row: int) -> Place:
        kind = self._all_kinds[self._kinds[row]]
        return Place(self._shards[row], self._firsts[row], kind, self._checksums[row])


def mark(address: str) -> int:
    """64 bits of an address."""
    return xxhash.xxh3_64_intdigest(address.encode())
