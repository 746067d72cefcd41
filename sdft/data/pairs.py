"""Examples of pairs of pictures: that of the preferred one, with the columns of the rejected one beside it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import numpy as np

from sdft.batch import REJECTED
from sdft.data.dataset import ImageDataset
from sdft.data.source import Source
from sdft.data.sources.splits import Subset


class PairDataset(ImageDataset):
    """The dataset of the preferred pictures whose training examples have the rejected ones too.

    Both pictures have the same key, and with it the same flip, place of the crop, augmentation and caption. Both have
    the training size of the preferred one.

    chosen: the dataset of the preferred pictures. rejected: a source of the others, with the same keys. hw_N2: heights
    and widths of these that are known without reading them.

    Attributes: rejected: the dataset of the rejected pictures, which has moments of its own.
    """

    def __init__(self, chosen: ImageDataset, rejected: Source, hw_N2: np.ndarray):
        self.__dict__.update(vars(chosen))
        self.rejected = copy.copy(chosen)
        self.rejected.source, self.rejected.hw_N2 = rejected, hw_N2

    def __getitem__(self, item: tuple) -> dict:
        return super().__getitem__(item) | rejected_columns(self.rejected[item])

    def prefetch(self, items: Sequence[tuple]) -> None:
        super().prefetch(items)
        self.rejected.prefetch(items)

    def prefetch_files(self, items: Sequence[tuple]) -> None:
        super().prefetch_files(items)
        self.rejected.prefetch_files(items)


def rejected_columns(example: dict) -> dict:
    """The picture of an example, and its size and crop, by the names of rejected ones."""
    return {name: example[own] for name in REJECTED if (own := name.removeprefix("rejected_")) in example}


def with_keys(source: Source, keys: Iterable[str]) -> tuple[Source, list[int]]:
    """The samples of a source with these keys, in their order, and their places in it."""
    place = {key: index for index, key in enumerate(source.keys)}
    places = [place[key] for key in keys]
    return (source if places == list(range(len(source.keys))) else Subset(source, places)), places
