"""Long lists of short texts in a few blocks of memory, where an object for each would take ten times as much.

Pure containers: know nothing of pictures.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence

import numpy as np
import xxhash


class PackedStrings(Sequence[str]):
    """Texts by position, one behind the other; a file name may hold any bytes."""

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
    """Texts that are found by what they say."""

    def __init__(self, texts: Iterable[str] = ()):
        self._by_mark: tuple[array, array] | None = None
        super().__init__(texts)

    def append(self, text: str) -> None:
        super().append(text)
        self._by_mark = None

    def find(self, text: str) -> int | None:
        """The position of a text; None where it is not among them."""
        if self._by_mark is None:
            marks = np.fromiter(map(mark, self), np.uint64, len(self))
            order = np.argsort(marks)
            self._by_mark = array("Q", marks[order].tobytes()), array("q", order.tobytes())
        ranked, places = self._by_mark
        sought = mark(text)
        for at in range(bisect_left(ranked, sought), len(ranked)):
            if ranked[at] != sought:
                break
            if self[places[at]] == text:
                return places[at]
        return None


class Concatenated:
    """Several lists as one, by their lengths."""

    def __init__(self, lengths: Iterable[int]):
        self._starts = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def place(self, position: int) -> tuple[int, int]:
        """Which of the lists has a position, and where."""
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return number, int(position - self._starts[number])


def unique(texts: PackedStrings) -> SearchableStrings:
    """Each text once."""
    again = {later for later, _ in repeated(texts)}
    return SearchableStrings(text for place, text in enumerate(texts) if place not in again)


def mark(text: str) -> int:
    """64 bits that stand for a text, the same in every process."""
    return xxhash.xxh3_64_intdigest(text.encode(errors="surrogateescape"))


def repeated(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(place, an earlier place) of each text that was there before, in order."""
    marks = np.fromiter(map(mark, texts), np.uint64, len(texts))
    order = np.argsort(marks, kind="stable")
    same = np.flatnonzero(marks[order[1:]] == marks[order[:-1]])
    pairs = [(int(order[at + 1]), int(order[at])) for at in same]
    return sorted((later, earlier) for later, earlier in pairs if texts[later] == texts[earlier])
