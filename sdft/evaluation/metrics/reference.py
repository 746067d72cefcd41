"""How near pictures are to a set of pictures of a look: as colours and patches, and as features of a network."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sdft.errors import UserError
from sdft.evaluation.distance import PATCH, SCALES, ordered
from sdft.evaluation.distance import StyleDistance as Ruler
from sdft.evaluation.distance import distance as between
from sdft.evaluation.metrics.measure import Drawn, Extractor, Lab, SourcePictures, cosine
from sdft.evaluation.results import Estimate, Metric
from sdft.evaluation.statistics import jackknife
from sdft.types import Count

MOST_PIXELS = 256
"""Side to which larger pictures are reduced: it keeps brush strokes."""


class StyleDistance:
    """The sliced Wasserstein distance of colours and patches to the reference; see `evaluation.distance`."""

    metric = Metric("style_distance", "distance to the look", "lower", "Colours and texture against the reference's.")
    needs = ("reference",)

    def __init__(self) -> None:
        self._ruler: Ruler | None = None

    def __call__(self, drawn: Drawn, lab: Lab) -> Estimate:
        if self._ruler is None:
            assert lab.reference is not None
            reference = SourcePictures(lab.reference)
            smallest = min(min(image.shape[:2]) for image in itertools.chain(drawn.images, reference))
            self._ruler = Ruler(reference, side=max(min(smallest, MOST_PIXELS), PATCH * max(SCALES)))
            self._target = ordered(self._ruler.reference)
        responses = self._ruler.responses(drawn.images)
        return jackknife(
            lambda rows: between(ordered({name: r[rows] for name, r in responses.items()}), self._target).d,
            drawn.units,
        )


class Similarity:
    """The mean cosine of each picture with the reference's pictures, in features that a network sees.

    With the judge it is CLIP-I; with DINOv2 or CSD the style or content similarity that these are known for.

    extractor: the network; the judge where not said.
    name, label: of the figure.
    """

    needs: tuple = ("reference",)

    def __init__(
        self, extractor: Extractor | None = None, name: str = "clip_i", label: str = "similarity to the look"
    ):
        self.metric = Metric(name, label, "higher", "How alike the reference's pictures they look to a network.")
        self.extractor = extractor
        self.needs = ("reference",) if extractor else ("reference", "judge")

    def __call__(self, drawn: Drawn, lab: Lab) -> np.ndarray:
        extractor = self.extractor or lab.clip
        return cosine(drawn.seen_by(extractor), lab.seen_of("reference", extractor)).mean(1).numpy()


class SetDistance:
    """A distance of two sets of features, N x D and M x D, with its interval."""

    def __init__(self, metric: Metric, of: Callable[[Tensor, Tensor], float], extractor: Extractor | None, least: int):
        self.metric, self._of, self.extractor, self.least = metric, of, extractor, least
        self.needs = ("reference",) if extractor else ("reference", "judge")

    def __call__(self, drawn: Drawn, lab: Lab) -> Estimate | None:
        extractor = self.extractor or lab.clip
        seen, reference = drawn.seen_by(extractor), lab.seen_of("reference", extractor)
        if min(len(seen), len(reference)) < self.least:
            raise UserError(
                f"metrics.{self.metric.name}: {len(seen)} pictures and {len(reference)} references, "
                f"needs at least {self.least} of each; set more seeds, or leave it out by ~metrics.{self.metric.name}"
            )
        return jackknife(lambda rows: self._of(seen[rows], reference), drawn.units)


def CMMD(extractor: Extractor | None = None) -> SetDistance:
    """Maximum mean discrepancy of CLIP features (Jayasumana et al. 2024).

    extractor: the judge where not said.
    """
    told = "Distance of the set to the reference's in a CLIP's features; unbiased by how many pictures there are."
    return SetDistance(Metric("cmmd", "CMMD", "lower", told), cmmd, extractor, 2)


def KID(extractor: Extractor | None = None) -> SetDistance:
    """Kernel inception distance (Binkowski et al. 2018), on any extractor.

    extractor: the judge where not said.
    """
    told = "Distance of the set to the reference's in a network's features; unbiased, can be below 0."
    return SetDistance(Metric("kid", "KID", "lower", told), kid, extractor, 2)


def FID(extractor: Extractor | None = None, least: Count = 50) -> SetDistance:
    """Frechet inception distance (Heusel et al. 2017), on any extractor. Biased upwards with few pictures.

    extractor: the judge where not said.
    least: pictures, and references, below which it is refused.
    """
    told = "Distance of two normal distributions in a network's features; only compare equal numbers of pictures."
    return SetDistance(Metric("fid", "FID", "lower", told), fid, extractor, least)


def cmmd(a_ND: Tensor, b_MD: Tensor, sigma: float = 10.0) -> float:
    """1000 MMD^2 with a Gaussian kernel of unit vectors; the unbiased estimate, without pairs of a vector and itself.

    The paper's own code keeps those pairs, which adds 1000 (1/N + 1/M) (1 - mean similarity): a constant for sets of
    one size, and a penalty on small ones.
    """

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (-torch.cdist(x, y).square() / (2 * sigma**2)).exp()

    return 1000 * _mmd(a_ND.double(), b_MD.double(), kernel)


def kid(a_ND: Tensor, b_MD: Tensor) -> float:
    """The unbiased MMD^2 with the kernel (x y / D + 1)^3."""
    return _mmd(a_ND.double(), b_MD.double(), lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3)


def fid(a_ND: Tensor, b_MD: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))."""
    a, b = a_ND.double(), b_MD.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root)


def _mmd(a: Tensor, b: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> float:
    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())
