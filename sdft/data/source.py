"""The contract of data sources: captioned images by index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from sdft.data.captions import Captions
from sdft.data.decode import StoredImage


@dataclass(frozen=True)
class Sample:
    """One captioned image.

    key: a stable name; seeds, caches and held-out sets go by it.
    image: uint8 array H x W x RGB, or a `StoredImage` that is read when its pixels are needed.
    caption: for validation; also for training, unless `captions` has several.
    loss_weight: factor on the loss of this sample.
    original_hw: size in pixels before the image was reduced to this one, if known; SDXL is conditioned on it.
    captions: the captions from which each visit draws one.
    """

    key: str
    image: np.ndarray | StoredImage
    caption: str
    loss_weight: float = 1.0
    original_hw: tuple[int, int] | None = None
    captions: Captions | None = None

    @property
    def image_HWC(self) -> np.ndarray:
        """uint8, RGB; a stored image is decoded again at each access. Raises UserError if it cannot be."""
        return self.image.pixels() if isinstance(self.image, StoredImage) else self.image


@runtime_checkable  # so that the config check tells a number or a path from a source
class Source(Protocol):
    """Captioned images by index.

    `keys` are unique, stable names of all samples, known without reading an image.
    """

    @property
    def keys(self) -> Sequence[str]: ...

    def __getitem__(self, index: int) -> Sample: ...


class StoredSource(ABC):
    """Base class of sources whose images are files, or members of files; others need only be a `Source`.

    They are checked before training, their sizes are known without decoding them again, and `data.cache=disk` finds
    them by the bytes of their files. For images of other sources the pixels are hashed instead.
    """

    keys: Sequence[str]

    @abstractmethod
    def __getitem__(self, index: int) -> Sample: ...

    @abstractmethod
    def stored(self, index: int) -> StoredImage | None:
        """The stored image of a sample, without reading it; None for a sample that is generated."""

    def mask(self, index: int) -> StoredImage | None:
        """The stored mask of a sample: white where the loss counts; None for a sample without one."""
        return None

    def shard_numbers(self) -> np.ndarray | None:
        """For each sample, the number of the file that it shares with others; None where each has its own."""
        return None

    def shards_that_fit(self) -> int | None:
        """How many of its shards have space on this machine at a time; None if all have."""
        return None

    def prefetch(self, indices: Sequence[int]) -> None:
        """Start fetching what the samples need that is not on this machine."""
        return


def left_out(source: Source) -> Sequence[str]:
    """What a source has left out, a line for each reason, if it says so."""
    return getattr(source, "left_out", ())


def stored_mask(source: Source, index: int) -> StoredImage | None:
    """The stored mask of a sample; None for one without."""
    return source.mask(index) if isinstance(source, StoredSource) else None


def shard_numbers(source: Source) -> np.ndarray | None:
    """For each sample, the number of the shard that has it; None for a source without shards."""
    return source.shard_numbers() if isinstance(source, StoredSource) else None


def shards_that_fit(source: Source) -> int | None:
    """How many shards of a source have space on this machine at a time; None if all have, or it has none."""
    return source.shards_that_fit() if isinstance(source, StoredSource) else None


def prefetch(source: Source, indices: Sequence[int]) -> None:
    """Start fetching what samples need that is not on this machine."""
    if isinstance(source, StoredSource):
        source.prefetch(indices)


def stored_image(source: Source, index: int) -> StoredImage | None:
    """The stored image of a sample; None if the source generates its images."""
    return source.stored(index) if isinstance(source, StoredSource) else None
