"""The index of a cache in memory: entries by address, in a few arrays however many there are.

Opens no file.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import torch

from sdft.data.packed_strings import SearchableStrings


class TensorKind(NamedTuple):
    """Size, dtype and shape of a tensor."""

    size: int
    """in bytes"""
    dtype: torch.dtype
    shape: tuple[int, ...]


class CacheEntry(NamedTuple):
    """Where one entry is."""

    shard: int
    first: int
    """offset of its first byte in the shard"""
    kind: TensorKind
    checksum: int


class CacheIndex:
    """Entries by address and by row, in the order in which they were added."""

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
            self._all_kinds.append(place.kind)  # one model has only a few
        self._kinds.append(self._all_kinds.index(place.kind))
        self._checksums.append(place.checksum)

    def row(self, address: str) -> int | None:
        """The row of an entry; None if there is none."""
        return self._addresses.find(address)

    def __getitem__(self, row: int) -> CacheEntry:
        kind = self._all_kinds[self._kinds[row]]
        return CacheEntry(self._shards[row], self._firsts[row], kind, self._checksums[row])
