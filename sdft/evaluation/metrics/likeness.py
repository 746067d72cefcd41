"""How pictures relate to their prompts, to the base's, to each other and to what was learned from."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from sdft.evaluation.metrics.features import Thumbnails
from sdft.evaluation.metrics.measure import Drawn, Extractor, Lab
from sdft.evaluation.results import Metric
from sdft.types import Positive

PIXELS = Thumbnails()
"""One for all metrics, so that pictures are reduced once."""


class Adherence:
    """The cosine of each picture with its prompt, as the judge sees it (CLIP-T; Hessel et al. 2021, unscaled)."""

    metric = Metric("adherence", "prompt adherence", "higher", "How well pictures show their prompts, to a CLIP.")
    needs = ("judge",)

    def __call__(self, drawn: Drawn, lab: Lab) -> np.ndarray:
        assert lab.judge is not None
        texts = lab.judge.embed_texts(drawn.prompts)
        return (drawn.seen_by(lab.clip) * texts).sum(1).numpy()


class Drift:
    """How far each picture is from the baseline's of the same prompt, seed and settings.

    extractor: what the distance is taken in; reduced pixels where not said.
    """

    metric = Metric(
        "drift",
        "drift from the baseline",
        None,
        "Distance to the baseline's picture of the same prompt and seed; on prompts away from the style, forgetting.",
    )
    needs = ()

    def __init__(self, extractor: Extractor | None = None):
        self.extractor = extractor or PIXELS

    def __call__(self, drawn: Drawn, lab: Lab) -> np.ndarray:
        assert lab.base is not None
        if drawn is lab.base:
            return np.full(len(drawn.cells), np.nan)
        place = {cell.pair: i for i, cell in enumerate(lab.base.cells)}
        own, base = drawn.seen_by(self.extractor), lab.base.seen_by(self.extractor)
        partners = [place.get(cell.pair) for cell in drawn.cells]
        distances = [np.nan if j is None else _rms(own[i] - base[j]) for i, j in enumerate(partners)]
        return np.array(distances)


class Diversity:
    """How far each picture is from those of the same prompt and settings under other seeds, on average.

    extractor: as in `Drift`.
    """

    metric = Metric("diversity", "diversity", "higher", "How different the pictures of one prompt are over seeds.")
    needs = ()

    def __init__(self, extractor: Extractor | None = None):
        self.extractor = extractor or PIXELS

    def __call__(self, drawn: Drawn, lab: Lab) -> np.ndarray:
        seen, alike = drawn.seen_by(self.extractor), defaultdict(list)
        for index, cell in enumerate(drawn.cells):
            alike[tuple(item for item in cell.pair if item[0] != "seed")].append(index)
        figures = np.full(len(drawn.cells), np.nan)
        for group in alike.values():
            if len(group) > 1:
                distances = _distances(seen[group], seen[group]) / seen.shape[1] ** 0.5
                figures[group] = (distances.sum(1) / (len(group) - 1)).numpy()
        return figures


class Novelty:
    """The distance of each picture to the nearest training picture, in units of how far those are from each other.

    The unit is the median distance of a training picture to its own nearest neighbour, so 1 is as new as another
    picture of the set, and a copy is near 0.

    extractor: as in `Drift`.
    """

    metric = Metric("novelty", "novelty", "higher", "Distance to the nearest training picture; a copy is near 0.")
    needs = ("training",)

    def __init__(self, extractor: Extractor | None = None):
        self.extractor = extractor or PIXELS

    def __call__(self, drawn: Drawn, lab: Lab) -> np.ndarray:
        training = lab.seen_of("training", self.extractor)
        among = _distances(training, training).fill_diagonal_(float("inf")).min(1).values
        unit = among.median() if len(training) > 1 else torch.tensor(training.shape[1] ** 0.5)
        return (_distances(drawn.seen_by(self.extractor), training).min(1).values / unit.clamp(min=1e-9)).numpy()


class Copies:
    """The share of pictures that are near copies of a training picture.

    threshold: the novelty below which a picture is a copy.
    extractor: as in `Drift`.
    """

    metric = Metric("copies", "near copies", "lower", "Share of pictures that nearly are a training picture.")
    needs = ("training",)

    def __init__(self, threshold: Positive = 0.3, extractor: Extractor | None = None):
        self.threshold, self._novelty = threshold, Novelty(extractor)

    def __call__(self, drawn: Drawn, lab: Lab) -> np.ndarray:
        return (self._novelty(drawn, lab) < self.threshold).astype(float)


def _distances(a_ND: torch.Tensor, b_MD: torch.Tensor) -> torch.Tensor:
    """N x M. Not by way of products, whose rounding would tell a copy from its original."""
    return torch.cdist(a_ND, b_MD, compute_mode="donot_use_mm_for_euclid_dist")


def _rms(difference: torch.Tensor) -> float:
    return float(difference.square().mean().sqrt())
