"""Splits of a source into training and held-out samples, by hashing their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from sdft.data.decode import StoredImage
from sdft.data.packed_strings import PackedStrings
from sdft.data.source import (
    Sample,
    Source,
    StoredSource,
    prefetch,
    shard_numbers,
    shards_that_fit,
    stored_image,
    stored_mask,
)
from sdft.rng import seed_of

Split = Literal["all", "train", "validation"]


def held_out(keys: Sequence[str], share: float) -> np.ndarray:
    """Whether each key is held out: about `share` of them, at least one and not all.

    A key is held out if its hash is below `share`, so adding images never moves others to the other split.
    """
    hashed = np.fromiter((seed_of(0, "held out", key) / 2**63 for key in keys), np.float64, len(keys))
    ranked = np.argsort(hashed, kind="stable")
    chosen = np.zeros(len(keys), bool)
    chosen[ranked[: min(max(1, np.count_nonzero(hashed < share)), len(keys) - 1)]] = True
    return chosen


def split_indices(keys: Sequence[str], split: Split, share: float) -> np.ndarray:
    """The indices of the keys of a split; `share` is held out for validation."""
    if split == "all":
        return np.arange(len(keys))
    return np.flatnonzero(held_out(keys, share) == (split == "validation"))


class Subset(StoredSource):
    """A source with some of the samples of another, by their indices in it."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices = source, indices
        self.keys = PackedStrings(source.keys[index] for index in indices)

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.indices[index]]

    def stored(self, index: int) -> StoredImage | None:
        return stored_image(self.source, self.indices[index])

    def mask(self, index: int) -> StoredImage | None:
        return stored_mask(self.source, self.indices[index])

    def shard_numbers(self) -> np.ndarray | None:
        numbers = shard_numbers(self.source)
        return None if numbers is None else numbers[np.asarray(self.indices)]

    def shards_that_fit(self) -> int | None:
        return shards_that_fit(self.source)

    def prefetch(self, indices: Sequence[int]) -> None:
        prefetch(self.source, [self.indices[index] for index in indices])
