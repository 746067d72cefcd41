"""Which pictures of a source are learned and which are kept back to judge the result: chosen by name alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from sdft.data.source import Sample, Source
from sdft.data.decode import StoredImage
from sdft.data.packed_strings import PackedStrings
from sdft.rng import seed_of

Split = Literal["all", "train", "validation"]


def held_out(keys: Sequence[str], share: float) -> np.ndarray:
    """Whether each key is kept back: about `share` of them, at least one and not all.

    Those are chosen that hash below it, so that adding some moves none.
    """
    hashed = np.fromiter((seed_of(0, "held out", key) / 2**63 for key in keys), np.float64, len(keys))
    ranked = np.argsort(hashed, kind="stable")
    chosen = np.zeros(len(keys), bool)
    chosen[ranked[: min(max(1, np.count_nonzero(hashed < share)), len(keys) - 1)]] = True
    return chosen


def split_indices(keys: Sequence[str], split: Split, share: float) -> np.ndarray:
    """The positions of the keys of a split."""
    if split == "all":
        return np.arange(len(keys))
    return np.flatnonzero(held_out(keys, share) == (split == "validation"))


class Subset:
    """Some of the samples of a source, by position."""

    def __init__(self, source: Source, places: Sequence[int]):
        self.source, self.places = source, places
        self.keys = PackedStrings(source.keys[place] for place in places)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.places[index]]

    def stored(self, index: int) -> StoredImage | None:
        return stored(self.source, self.places[index])


def stored(source: Source, index: int) -> StoredImage | None:
    """The stored picture of a sample; None where the source draws its pictures."""
    return source.stored(index) if hasattr(source, "encoded") else None
