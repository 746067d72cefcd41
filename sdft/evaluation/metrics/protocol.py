"""What a metric is, and the inputs that it is called with.

To write one, implement `Metric`: `info` names it, `needs` lists the inputs without which it is left out, and a call
with the images of one subject returns one value per image, or one estimate for the whole set:

    class MeanRed:
        info = MetricInfo("mean_red", "mean red", better=None, meaning="Mean of the red channel, 0 to 255.")
        needs = ()

        def __call__(self, generated: GeneratedImages, inputs: MetricInputs) -> np.ndarray:
            return np.array([image[..., 0].mean() for image in generated.images])

and choose it by `'+metrics.mean_red={_target_: my_lab.MeanRed}'`, or from a file of the config group `metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from sdft.data.source import Source
from sdft.data.sources import Folder, ToyWorld
from sdft.data.sources.toy import Look
from sdft.errors import UserError
from sdft.evaluation.clip_judge import Images, Judge
from sdft.evaluation.grid import GridCell
from sdft.evaluation.results import Estimate, MetricInfo
from sdft.evaluation.statistics import units
from sdft.protocols import DiffusionModel

Need = Literal["judge", "reference", "training", "held_out"]
"""An input that the user may or may not give; the key of eval.yaml that gives it."""
NUM_TOY = 128
MIN_REFERENCES = 4
"""Below this number of images, a distance describes those images and not their style."""


class Extractor(Protocol):
    """A feature extractor: uint8 RGB images to features, N x D, fp32 on the CPU.

    Features are cached by extractor, so instances are hashable, as objects of ordinary classes are.
    """

    def __call__(self, images: Images) -> Tensor: ...


@runtime_checkable
class Metric(Protocol):
    """Measures the images of one subject at a time; every subject is measured, the baseline included.

    An instance lives for one comparison. It may cache what does not depend on the subject.
    """

    @property
    def info(self) -> MetricInfo:
        """Name, label, direction (`better`) and meaning, as tables and the page show them; a class attribute fits."""

    @property
    def needs(self) -> tuple[Need, ...]:
        """Inputs that must be given. If one is missing, the metric is left out and the command reports it."""

    def __call__(self, generated: GeneratedImages, inputs: MetricInputs) -> np.ndarray | Estimate | None:
        """Measure the images of one subject.

        Returns one value per image, in the order of `generated.images`, NaN where there is none: these are averaged
        with a bootstrap interval and tested against the baseline. Or one `Estimate` of the whole set, which is not
        tested. Or None, if there is nothing to measure. Raise UserError if a setting makes it impossible.
        """


@dataclass
class GeneratedImages:
    """The images of one subject.

    name: of the subject, as in the results.
    cells: for each image its prompt, seed and settings (`GridCell`).
    images: uint8 RGB, H x W x 3 each, read from disk on access.
    open: context manager that gives the subject's model, for metrics that do more than look at images.
    """

    name: str
    cells: Sequence[GridCell]
    images: Sequence[np.ndarray]
    open: Callable[[], AbstractContextManager[DiffusionModel]]
    _features: dict[Extractor, Tensor] = field(default_factory=dict)

    @property
    def prompts(self) -> list[str]:
        """The prompt of each image."""
        return [cell.settings.prompt for cell in self.cells]

    @cached_property
    def units(self) -> list[Hashable]:
        """The statistically independent unit that each image belongs to; see `evaluation.statistics`."""
        return units(self.prompts, [cell.settings.seed for cell in self.cells])

    def features(self, extractor: Extractor) -> Tensor:
        """Features of the images, N x D, computed once for all metrics that share the extractor."""
        if extractor not in self._features:
            self._features[extractor] = extractor(self.images)
        return self._features[extractor]


@dataclass
class MetricInputs:
    """What images are compared with. An input that the user did not give is None; name it in `Metric.needs`.

    judge: the CLIP model of `judge=`.
    reference: images of the target style.
    training: the images of the training set.
    held_out: captioned images that were not trained on.
    baseline: the images of the baseline, the subject that the others are compared with. Always given in a comparison.
    """

    judge: Judge | None = None
    reference: Source | None = None
    training: Source | None = None
    held_out: Source | None = None
    baseline: GeneratedImages | None = None
    _features: dict[tuple[str, Extractor], Tensor] = field(default_factory=dict)

    def missing(self, needs: Sequence[Need]) -> list[str]:
        """Those of `needs` that are not given."""
        given: dict[str, object] = {
            "judge": self.judge,
            "reference": self.reference,
            "training": self.training,
            "held_out": self.held_out,
        }
        if unknown := [need for need in needs if need not in given]:
            raise UserError(f"a metric needs {unknown[0]!r}, which does not exist; choose from {', '.join(given)}")
        return [need for need in needs if given[need] is None]

    def features(self, name: Literal["reference", "training"], extractor: Extractor) -> Tensor:
        """Features of the reference or training images, N x D, computed once per extractor."""
        source = self.reference if name == "reference" else self.training
        if source is None:
            raise UserError(f"{name}=null: this metric needs images; set {name}= to a folder")
        if (name, extractor) not in self._features:
            self._features[name, extractor] = extractor(SourceImages(source))
        return self._features[name, extractor]

    @property
    def clip(self) -> Extractor:
        """The judge's image encoder as a feature extractor."""
        if self.judge is None:
            raise UserError("judge=null: this metric needs a CLIP; set judge=nano, a folder or a hub id")
        return self.judge.embed_images


class SourceImages(Sequence[np.ndarray]):
    """The images of a data source, read on access."""

    def __init__(self, source: Source, indices: Sequence[int] | None = None):
        self.source, self.indices = source, range(len(source.keys)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return SourceImages(self.source, self.indices[index])
        return self.source[self.indices[index]].image_HWC


def read_source(key: str, name: str | None, size: int, least: int = 1) -> Source | None:
    """Images by name: a folder, or `toy/LOOK` or `toy/LOOK/SPLIT` of the procedural toy world.

    key: the config key, for error messages. size: side of toy images in pixels. least: the fewest images allowed.
    """
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
        raise UserError(f"{key}={name}: has {len(source.keys)} images, and this comparison needs at least {least}")
    return source


def scalars(values: Mapping[str, np.ndarray], index: int) -> dict[str, float]:
    """The values of one image by metric; NaN is left out."""
    return {name: float(of_images[index]) for name, of_images in values.items() if not np.isnan(of_images[index])}


def cosine(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    """Cosine similarity of every pair, N x M."""
    return torch.nn.functional.normalize(a_ND, dim=1) @ torch.nn.functional.normalize(b_MD, dim=1).T
