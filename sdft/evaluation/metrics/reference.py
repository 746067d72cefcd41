"""Distance of generated images to the reference images of the target style, in colours and patches or in features."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_kernel

from sdft.errors import UserError
from sdft.evaluation.metrics.protocol import Extractor, GeneratedImages, MetricInputs, SourceImages, cosine
from sdft.evaluation.results import Estimate, MetricInfo
from sdft.evaluation.statistics import jackknife
from sdft.evaluation.style_distance import PATCH, SCALES, SlicedWasserstein, set_distance, sort_projections
from sdft.types import Count

MAX_SIDE = 256
"""Larger images are reduced until their shorter edge has this many pixels; brush strokes stay visible."""


class StyleDistance:
    """The sliced Wasserstein distance of colours and patches to the reference; see `evaluation.style_distance`."""

    info = MetricInfo("style_distance", "style distance", "lower", "Distance to the reference in colours and texture.")
    needs = ("reference",)

    def __init__(self) -> None:
        self._distance: SlicedWasserstein | None = None

    def __call__(self, generated: GeneratedImages, inputs: MetricInputs) -> Estimate:
        if self._distance is None:
            assert inputs.reference is not None
            reference = SourceImages(inputs.reference)
            smallest = min(min(image.shape[:2]) for image in itertools.chain(generated.images, reference))
            self._distance = SlicedWasserstein(reference, side=max(min(smallest, MAX_SIDE), PATCH * max(SCALES)))
            self._target = sort_projections(self._distance.reference)
        projections = self._distance.projections(generated.images)

        def distance_of(rows: np.ndarray) -> float:
            chosen = {name: values[rows] for name, values in projections.items()}
            return set_distance(sort_projections(chosen), self._target).d

        return jackknife(distance_of, generated.units)


class Similarity:
    """Mean cosine similarity of each image with the reference images, in the features of a network.

    With the judge this is CLIP-I; with DINOv2 or CSD it is their content or style similarity.

    extractor: the network; by default the judge.
    name, label: of the metric.
    """

    needs: tuple = ("reference",)

    def __init__(
        self, extractor: Extractor | None = None, name: str = "clip_i", label: str = "similarity to the reference"
    ):
        self.info = MetricInfo(name, label, "higher", "Similarity to the reference in the features of a network.")
        self.extractor = extractor
        self.needs = ("reference",) if extractor else ("reference", "judge")

    def __call__(self, generated: GeneratedImages, inputs: MetricInputs) -> np.ndarray:
        extractor = self.extractor or inputs.clip
        return cosine(generated.features(extractor), inputs.features("reference", extractor)).mean(1).numpy()


class SetDistance:
    """The distance of the images to the reference, as two sets of features, with a jackknife interval.

    of: the distance of features N x D and M x D.
    extractor: the network; by default the judge.
    least: the fewest images, and reference images, allowed.
    """

    def __init__(
        self, info: MetricInfo, of: Callable[[Tensor, Tensor], float], extractor: Extractor | None, least: int
    ):
        self.info, self._of, self.extractor, self.least = info, of, extractor, least
        self.needs = ("reference",) if extractor else ("reference", "judge")

    def __call__(self, generated: GeneratedImages, inputs: MetricInputs) -> Estimate | None:
        extractor = self.extractor or inputs.clip
        features, reference = generated.features(extractor), inputs.features("reference", extractor)
        if min(len(features), len(reference)) < self.least:
            raise UserError(
                f"metrics.{self.info.name}: {len(features)} images and {len(reference)} references, "
                f"needs at least {self.least} of each; set more seeds, or leave it out by ~metrics.{self.info.name}"
            )
        return jackknife(lambda rows: self._of(features[rows], reference), generated.units)


def CMMD(extractor: Extractor | None = None) -> SetDistance:
    """Maximum mean discrepancy of CLIP features (Jayasumana et al. 2024).

    extractor: the network; by default the judge.
    """
    meaning = "Distance of the set to the reference in CLIP features; unbiased, whatever the number of images."
    return SetDistance(MetricInfo("cmmd", "CMMD", "lower", meaning), cmmd, extractor, 2)


def KID(extractor: Extractor | None = None) -> SetDistance:
    """Kernel inception distance (Binkowski et al. 2018), on any extractor.

    extractor: the network; by default the judge.
    """
    meaning = "Distance of the set to the reference in the features of a network; unbiased, can be below 0."
    return SetDistance(MetricInfo("kid", "KID", "lower", meaning), kid, extractor, 2)


def FID(extractor: Extractor | None = None, least: Count = 50) -> SetDistance:
    """Frechet inception distance (Heusel et al. 2017), on any extractor. Biased upwards with few images.

    extractor: the network; by default the judge.
    least: the fewest images, and reference images, allowed.
    """
    meaning = "Distance of two normal distributions in the features of a network; only compare equal numbers of images."
    return SetDistance(MetricInfo("fid", "FID", "lower", meaning), fid, extractor, least)


def cmmd(a_ND: Tensor, b_MD: Tensor, sigma: float = 10.0) -> float:
    """1000 MMD^2 of unit vectors with a Gaussian kernel; unbiased: without the pairs of a vector with itself.

    The code of the paper keeps those pairs, which adds 1000 (1/N + 1/M) (1 - mean similarity): a constant for sets of
    one size, and a bias for small ones.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (-torch.cdist(x, y).square() / (2 * sigma**2)).exp()

    return 1000 * _mmd(a_ND.double(), b_MD.double(), kernel)


def kid(a_ND: Tensor, b_MD: Tensor) -> float:
    """The unbiased MMD^2 with torchmetrics' polynomial kernel, (x y / D + 1)^3, over all pairs.

    `KernelInceptionDistance` of torchmetrics is not used as a whole: it averages over random subsets of equal size,
    drawn from the global generator. It would leave out images of the larger set, and the jackknife interval would
    contain the scatter of the subsets. For sets of equal size, subsets of that size give this value.
    """
    return _mmd(a_ND.double(), b_MD.double(), poly_kernel)


def fid(a_ND: Tensor, b_MD: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), by torchmetrics in fp64."""
    metric = FrechetInceptionDistance(feature=_Precomputed(a_ND.shape[1]))
    metric.update(b_MD.double(), real=True)
    metric.update(a_ND.double(), real=False)
    return float(metric.compute())


class _Precomputed(nn.Identity):
    """The feature network of a torchmetrics metric that is given features instead of images."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def _mmd(a: Tensor, b: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> float:
    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())
