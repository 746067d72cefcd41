"""What a metric is, and what it may look at.

A metric is a small object: `metric` says what its figure means, and called with what a subject drew it gives one
figure a picture, or one estimate of the whole set. Knows no metric.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from sdft.data.dataset import Source
from sdft.data.sources import Folder, ToyWorld
from sdft.data.sources.toy import Look
from sdft.errors import UserError
from sdft.evaluation.adherence import Judge
from sdft.evaluation.grid import Cell
from sdft.evaluation.results import Estimate, Metric
from sdft.evaluation.statistics import units
from sdft.models.sdxl import SDXL

Pictures = np.ndarray | Sequence[np.ndarray]
"""uint8 RGB, N x H x W x 3 or a sequence of H x W x 3."""
Need = Literal["judge", "reference", "training", "held_out"]
NUM_TOY = 128
LEAST_REFERENCES = 4
"""Pictures that make a look: a distance to fewer speaks of those pictures."""


class Extractor(Protocol):
    """What a metric sees of pictures."""

    def __call__(self, pictures: Pictures) -> Tensor: ...


class Measure(Protocol):
    """Gives a figure for each picture (NaN where there is none), or an estimate of the set."""

    metric: Metric
    needs: tuple[Need, ...]

    def __call__(self, drawn: Drawn, lab: Lab) -> np.ndarray | Estimate | None: ...


@dataclass
class Drawn:
    """What one subject drew, in the order of its cells.

    open: the subject's model, as a context.
    """

    name: str
    cells: Sequence[Cell]
    images: Sequence[np.ndarray]
    open: Callable[[], AbstractContextManager[SDXL]]
    _seen: dict[int, Tensor] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        return [cell.setting.prompt for cell in self.cells]

    @cached_property
    def units(self) -> list[Hashable]:
        """The independent witness that each picture belongs to."""
        return units(self.prompts, [cell.setting.seed for cell in self.cells])

    def seen_by(self, extractor: Extractor) -> Tensor:
        """Features of the pictures, N x D, taken once for all metrics that share the extractor."""
        return _once(self._seen, extractor, self.images)


@dataclass
class Lab:
    """What metrics compare with; what the user did not give is None.

    base: what the baseline drew. reference: pictures of the look. training: what was learned from.
    held_out: captioned pictures for the loss.
    """

    judge: Judge | None = None
    reference: Source | None = None
    training: Source | None = None
    held_out: Source | None = None
    base: Drawn | None = None
    _seen: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def lacks(self, needs: Sequence[Need]) -> list[str]:
        """Those of `needs` that are not there."""
        return [need for need in needs if getattr(self, need) is None]

    def seen_of(self, what: Literal["reference", "training"], extractor: Extractor) -> Tensor:
        """Features of the pictures that are compared with."""
        key = what, id(extractor)
        if key not in self._seen:
            self._seen[key] = extractor(SourcePictures(getattr(self, what)))
        return self._seen[key]

    @property
    def clip(self) -> Extractor:
        """The judge's eyes; the same object every time, so that they look once."""
        if self.judge is None:
            raise UserError("judge=null: this metric needs a CLIP; set judge=nano, a folder or a hub id")
        if not hasattr(self, "_clip"):
            self._clip = self.judge.embed_images
        return self._clip


class SourcePictures(Sequence[np.ndarray]):
    """The pictures of a source, read when asked for."""

    def __init__(self, source: Source, indices: Sequence[int] | None = None):
        self.source, self.indices = source, range(len(source.keys)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return SourcePictures(self.source, self.indices[index])
        return self.source[self.indices[index]].image_HWC


def read_source(key: str, name: str | None, size: int, least: int = 1) -> Source | None:
    """Pictures by name: a folder, or `toy/LOOK` and `toy/LOOK/train` of the procedural world."""
    if name is None:
        return None
    first, *rest = name.split("/")
    if first == "toy" and rest and rest[0] in get_args(Look) and rest[1:] in ([], ["train"], ["validation"], ["test"]):
        split = rest[1] if rest[1:] else "test"
        return ToyWorld([rest[0]], NUM_TOY, split, size=size)  # type: ignore[list-item, arg-type]
    try:
        source = Folder(name, "all", default_caption="")
    except UserError as error:
        raise UserError(str(error).replace("data.root", key)) from error
    if len(source.keys) < least:
        raise UserError(f"{key}={name}: has {len(source.keys)} pictures, and this comparison needs at least {least}")
    return source


def scalars(figures: Mapping[str, np.ndarray], index: int) -> dict[str, float]:
    """The figures of one picture, those that there are."""
    return {name: float(values[index]) for name, values in figures.items() if not np.isnan(values[index])}


def cosine(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    """Cosines of every pair, N x M."""
    return torch.nn.functional.normalize(a_ND, dim=1) @ torch.nn.functional.normalize(b_MD, dim=1).T


def _once(seen: dict[int, Tensor], extractor: Extractor, pictures: Pictures) -> Tensor:
    if id(extractor) not in seen:
        seen[id(extractor)] = extractor(pictures)
    return seen[id(extractor)]
