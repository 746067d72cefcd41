"""Similarity of generated images to their prompts, to the baseline's images, to each other and to training images."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from sdft.evaluation.metrics.features import Thumbnails
from sdft.evaluation.metrics.protocol import Extractor, GeneratedImages, MetricInputs
from sdft.evaluation.results import MetricInfo
from sdft.types import Positive

THUMBNAILS = Thumbnails()
"""One instance for all metrics, so that its features are computed once."""


class Adherence:
    """Cosine similarity of each image with its prompt, by the judge (CLIP-T; Hessel et al. 2021, without scaling)."""

    info = MetricInfo("adherence", "prompt adherence", "higher", "CLIP similarity of images and their prompts.")
    needs = ("judge",)

    def __call__(self, generated: GeneratedImages, inputs: MetricInputs) -> np.ndarray:
        assert inputs.judge is not None
        texts = inputs.judge.embed_texts(generated.prompts)
        return (generated.features(inputs.clip) * texts).sum(1).numpy()


class Drift:
    """Distance of each image to the baseline's image of the same prompt, seed and settings (root mean square).

    extractor: features in which the distance is taken; by default the pixels of a thumbnail.
    """

    info = MetricInfo(
        "drift",
        "drift from the baseline",
        None,
        "Distance to the baseline's image of the same prompt and seed; with prompts unlike the style, forgetting.",
    )
    needs = ()

    def __init__(self, extractor: Extractor | None = None):
        self.extractor = extractor or THUMBNAILS

    def __call__(self, generated: GeneratedImages, inputs: MetricInputs) -> np.ndarray:
        assert inputs.baseline is not None
        if generated is inputs.baseline:
            return np.full(len(generated.cells), np.nan)
        index_of = {cell.pair: i for i, cell in enumerate(inputs.baseline.cells)}
        own, base = generated.features(self.extractor), inputs.baseline.features(self.extractor)
        partners = [index_of.get(cell.pair) for cell in generated.cells]
        distances = [np.nan if j is None else _rms(own[i] - base[j]) for i, j in enumerate(partners)]
        return np.array(distances)


class Diversity:
    """Mean distance of each image to those of the same prompt and settings with other seeds.

    extractor: as in `Drift`.
    """

    info = MetricInfo("diversity", "diversity", "higher", "How much the images of one prompt differ between seeds.")
    needs = ()

    def __init__(self, extractor: Extractor | None = None):
        self.extractor = extractor or THUMBNAILS

    def __call__(self, generated: GeneratedImages, inputs: MetricInputs) -> np.ndarray:
        features_ND, groups = generated.features(self.extractor), defaultdict(list)
        for index, cell in enumerate(generated.cells):
            groups[tuple(item for item in cell.pair if item[0] != "seed")].append(index)
        values = np.full(len(generated.cells), np.nan)
        for group in groups.values():
            if len(group) > 1:
                distances = _distances(features_ND[group], features_ND[group]) / features_ND.shape[1] ** 0.5
                values[group] = (distances.sum(1) / (len(group) - 1)).numpy()
        return values


class Novelty:
    """Distance of each image to the nearest training image, relative to the distances within the training set.

    The unit is the median distance of a training image to its own nearest neighbour: at 1, an image is as far from the
    training set as another image of that set would be; a copy is near 0.

    extractor: as in `Drift`.
    """

    info = MetricInfo("novelty", "novelty", "higher", "Distance to the nearest training image; a copy is near 0.")
    needs = ("training",)

    def __init__(self, extractor: Extractor | None = None):
        self.extractor = extractor or THUMBNAILS

    def __call__(self, generated: GeneratedImages, inputs: MetricInputs) -> np.ndarray:
        return relative_novelty(generated.features(self.extractor), inputs.features("training", self.extractor))


class Copies:
    """Share of images that are near copies of a training image.

    threshold: the novelty below which an image is a copy.
    extractor: as in `Drift`.
    """

    info = MetricInfo("copies", "near copies", "lower", "Share of images that nearly equal a training image.")
    needs = ("training",)

    def __init__(self, threshold: Positive = 0.3, extractor: Extractor | None = None):
        self.threshold, self._novelty = threshold, Novelty(extractor)

    def __call__(self, generated: GeneratedImages, inputs: MetricInputs) -> np.ndarray:
        return (self._novelty(generated, inputs) < self.threshold).astype(float)


def relative_novelty(images_ND: torch.Tensor, training_MD: torch.Tensor) -> np.ndarray:
    """Distance of each image to the nearest training image; see `Novelty`. Both are features; returns N."""
    nearest = _distances(training_MD, training_MD).fill_diagonal_(float("inf")).min(1).values
    unit = nearest.median() if len(training_MD) > 1 else torch.tensor(training_MD.shape[1] ** 0.5)
    distances = _distances(images_ND, training_MD).min(1).values
    return (distances / unit.clamp(min=1e-9)).numpy()


def _distances(a_ND: torch.Tensor, b_MD: torch.Tensor) -> torch.Tensor:
    """Euclidean distances, N x M. Without matrix products: their rounding error hides exact copies."""
    return torch.cdist(a_ND, b_MD, compute_mode="donot_use_mm_for_euclid_dist")


def _rms(difference: torch.Tensor) -> float:
    return float(difference.square().mean().sqrt())
