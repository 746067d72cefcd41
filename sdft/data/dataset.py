"""Samples in their order: which sample is read at which position of the run, and how it is cut and captioned.

A run is one endless sequence of samples, a fresh permutation of the source after another. Everything here is a
function of (run seed, position), so a resumed run goes on where it stopped, whatever the workers or the batch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from sdft.data.images import Crop, cut_image, plan_cut
from sdft.rng import Draws, generator
from sdft.types import Batch, Count, Fraction, UserError


@dataclass(frozen=True)
class Sample:
    """One captioned picture."""

    key: str
    image_HWC: np.ndarray
    """uint8, RGB"""
    caption: str
    loss_weight: float = 1.0
    original_hw: tuple[int, int] | None = None
    """Size before the picture was reduced to these pixels, where that is known."""


class Source(Protocol):
    """Captioned pictures by index. `keys` are stable names, known without reading a picture."""

    @property
    def keys(self) -> Sequence[str]: ...

    def __getitem__(self, index: int) -> Sample: ...


class RunOrder(Sampler[list[tuple[int, int]]]):
    """Batches of (index, visit) from batch number `start` to `stop`; rank r takes its slice of each global batch."""

    def __init__(
        self, size: int, batch_size: int, seed: int, start: int, stop: int, rank: int = 0, world_size: int = 1
    ):
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size

    def __len__(self) -> int:
        return self.stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        visit, order = -1, None
        for batch in range(self.start, self.stop):
            first = (batch * self.world_size + self.rank) * self.batch_size
            items = []
            for position in range(first, first + self.batch_size):
                if position // self.size != visit:
                    visit = position // self.size
                    order = torch.randperm(self.size, generator=generator(self.seed, "order", counter=visit)).tolist()
                items.append((order[position % self.size], visit))
            yield items


class Pictures(Dataset):
    """Cuts and captions of a source. `moments` replaces the pixels once the VAE has seen every variant."""

    def __init__(
        self,
        source: Source,
        size_hw: tuple[int, int],
        seed: int,
        crop: Crop = "center",
        flip: bool = False,
        caption_dropout: Fraction = 0.0,
    ):
        self.source, self.size_hw, self.seed = source, size_hw, seed
        self.crop, self.flip, self.caption_dropout = crop, flip, caption_dropout
        self.moments: dict[tuple[int, bool], Tensor] = {}

    def __getitem__(self, item: tuple[int, int]) -> dict:
        index, visit = item
        draws = Draws(self.seed, [self.source.keys[index]], [visit])
        flip = self.flip and bool(draws.uniform("flip") < 0.5)
        example = self.variant(index, flip, draws)
        example["visits"] = visit
        example["dropped_B"] = bool(draws.uniform("caption dropout") < self.caption_dropout)
        return example

    def variant(self, index: int, flip: bool, draws: Draws | None = None) -> dict:
        """One sample as it is cut, with pixels or, where they are known, moments."""
        sample = self.source[index]
        at = (0.5, 0.5)
        if self.crop == "random" and draws is not None:
            at = (float(draws.uniform("crop top")), float(draws.uniform("crop left")))
        cut = plan_cut(sample.image_HWC.shape[:2], self.size_hw, at, flip)
        if sample.original_hw:
            cut = replace(cut, original_hw=sample.original_hw)
        example = {
            "keys": sample.key,
            "visits": 0,
            "captions": sample.caption,
            "dropped_B": False,
            "time_ids_B6": torch.tensor(cut.time_ids_6, dtype=torch.float32),
            "loss_weight_B": sample.loss_weight,
        }
        moments = self.moments.get((index, flip))
        if moments is None:
            return example | {"pixels_BCHW": cut_image(sample.image_HWC, cut)}
        return example | {"moments_BCHW": moments}

    def cacheable_variants(self) -> list[tuple[int, bool]]:
        """Every (index, flip) the run can ask for; an error where there is no such finite list."""
        if self.crop == "random":
            raise UserError("data.cache=ram keeps one cut a picture: set data.crop=center, or data.cache=off")
        return [(i, flip) for i in range(len(self.source.keys)) for flip in ((False, True) if self.flip else (False,))]


def collate(examples: Sequence[dict]) -> Batch:
    """Examples of one size as a batch."""
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    for name, values in columns.items():
        if name.split("_")[-1].startswith("B"):
            columns[name] = torch.stack([torch.as_tensor(value) for value in values])
    columns["loss_weight_B"] = columns["loss_weight_B"].float()
    return Batch(**columns)


def batches(pictures: Pictures, indices: Sequence[int], batch_size: Count) -> Iterator[Batch]:
    """Consecutive batches of the unflipped, undropped samples: for validation and for filling a cache."""
    for first in range(0, len(indices), batch_size):
        yield collate([pictures.variant(index, flip=False) for index in indices[first : first + batch_size]])
