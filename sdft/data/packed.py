"""Long lists of short texts in a few blocks of memory, where an object for each would take ten times as much.

Pure containers: know nothing of pictures.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import numpy as np


class Strings(Sequence[str]):
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


def repeated(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(place, an earlier place) of each text that was there before, in order."""
    marks = np.fromiter(map(hash, texts), np.int64, len(texts))
    order = np.argsort(marks, kind="stable")
    same = np.flatnonzero(marks[order[1:]] == marks[order[:-1]])
    pairs = [(int(order[at + 1]), int(order[at])) for at in same]
    return sorted((later, earlier) for later, earlier in pairs if texts[later] == texts[earlier])
