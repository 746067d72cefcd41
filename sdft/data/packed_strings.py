"""Sequences of many short strings in a few blocks of memory; one object for each would take ten times as much."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np
import xxhash


class PackedStrings(Sequence[str]):
    """Strings by position. File names that are not valid UTF-8 are kept as they are (surrogateescape)."""

    def __init__(self, texts: Iterable[str] = ()):
        self._block, self._ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        self._block += text.encode(errors="surrogateescape")
        self._ends.append(len(self._block))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._block[self._ends[place] : self._ends[place + 1]].decode(errors="surrogateescape")


class SearchableStrings(PackedStrings):
    """Strings that can also be searched by value."""

    def __init__(self, texts: Iterable[str] = ()):
        self._by_hash: tuple[array, array] | None = None
        super().__init__(texts)

    def append(self, text: str) -> None:
        super().append(text)
        self._by_hash = None

    def find(self, text: str) -> int | None:
        """The position of a string; None if it is not in the sequence."""
        if self._by_hash is None:
            hashes = np.fromiter(map(string_hash, self), np.uint64, len(self))
            order = np.argsort(hashes)
            self._by_hash = array("Q", hashes[order].tobytes()), array("q", order.tobytes())
        hashes_sorted, places = self._by_hash
        content = text.encode(errors="surrogateescape")
        sought = string_hash(text)
        at = bisect_left(hashes_sorted, sought)
        while at < len(hashes_sorted) and hashes_sorted[at] == sought:
            place = places[at]
            if self._block[self._ends[place] : self._ends[place + 1]] == content:
                return place
            at += 1
        return None


class Concatenated:
    """Positions in the concatenation of several sequences, by their lengths."""

    def __init__(self, lengths: Iterable[int]):
        self._starts = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, position: int) -> tuple[int, int]:
        """(number of the sequence, position in it)"""
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return number, int(position - self._starts[number])

    def numbers(self, positions: np.ndarray) -> np.ndarray:
        """The number of the sequence of each position."""
        return np.searchsorted(self._starts, positions, side="right") - 1


def printable(name: str) -> str:
    """The name of a file, with `\\udc..` for bytes that are not valid UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def unique(texts: PackedStrings) -> SearchableStrings:
    """The strings without duplicates."""
    again = {later for later, _ in repeated(texts)}
    return SearchableStrings(text for place, text in enumerate(texts) if place not in again)


def string_hash(text: str) -> int:
    """64 bits, the same in every process."""
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogateescape"))


def repeated(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(position, earlier position) of each string that occurred before, in order."""
    hashes = np.fromiter(map(string_hash, texts), np.uint64, len(texts))
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    pairs = [(int(order[at + 1]), int(order[at])) for at in same]
    return sorted((later, earlier) for later, earlier in pairs if texts[later] == texts[earlier])
