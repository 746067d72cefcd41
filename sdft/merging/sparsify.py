"""Merge methods that sparsify task vectors before they are added to a base: TIES, DARE, DELLA.

Pure functions, as in `methods`. The task vectors are averaged, not summed, so `alpha` does not depend on their number.
Must not depend on names of weights, files or models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from sdft.errors import UserError
from sdft.merging.annotations import BlockFloat, Density, TaskVectors, Uniform, Weight
from sdft.merging.methods import mean
from sdft.merging.statistics import Thresholds
from sdft.types import Fraction, Index


def ties(
    base: Weight, models: TaskVectors, thresholds: Thresholds, density: Density = 0.2, alpha: BlockFloat = 1.0
) -> Weight:
    """base + alpha TIES(deltas), arXiv:2306.01708: trim, elect a sign, average the elements with that sign.

    density: the fraction of each tensor's elements that is kept, those of the largest magnitude.
    """
    kept = [trimmed(delta, threshold) for delta, threshold in zip(models, thresholds, strict=True)]
    return torch.add(base, elected_mean(kept), alpha=alpha)


def dare(
    base: Weight,
    models: TaskVectors,
    uniform: Uniform,
    density: Density = 0.5,
    alpha: BlockFloat = 1.0,
    seed: Index = 0,
) -> Weight:
    """base + alpha mean(DARE(delta)), arXiv:2311.03099: drops elements at random and rescales the others.

    density: the probability to keep an element, and the number that kept ones are divided by.
    """
    return torch.add(base, mean(random_dropped(models, uniform, density, seed)), alpha=alpha)


def dare_ties(
    base: Weight,
    models: TaskVectors,
    uniform: Uniform,
    density: Density = 0.5,
    alpha: BlockFloat = 1.0,
    seed: Index = 0,
) -> Weight:
    """base + alpha times the mean by TIES' sign election of deltas that DARE has sparsified."""
    return torch.add(base, elected_mean(random_dropped(models, uniform, density, seed)), alpha=alpha)


def della(
    base: Weight,
    models: TaskVectors,
    uniform: Uniform,
    density: Density = 0.5,
    window: Fraction = 0.2,
    alpha: BlockFloat = 1.0,
    seed: Index = 0,
) -> Weight:
    """base + alpha DELLA(deltas), arXiv:2406.11617: DARE that prefers large magnitudes, then TIES' sign election.

    The probability to keep an element grows with the rank of its magnitude within its row, from density - window / 2
    to density + window / 2.
    """
    if not 0 < density - window / 2 <= density + window / 2 <= 1:
        raise UserError(f"window={window:g}: density={density:g} -+ window / 2 must be above 0 and at most 1")
    kept = []
    for i, delta in enumerate(models):
        probability = (density - window / 2) + window * ranks(delta)
        kept.append(delta / probability * (uniform(seed, i, delta.shape) < probability))
    return torch.add(base, elected_mean(kept), alpha=alpha)


def trimmed(delta: Tensor, threshold: float) -> Tensor:
    """The delta with every element whose magnitude is below the threshold set to 0."""
    kind = np.float64 if delta.dtype == torch.float64 else np.float32
    just_below = np.nextafter(kind(threshold), kind(0))
    return hardshrink(delta, float(just_below))  # one pass; a mask would take four


def random_dropped(deltas: Sequence[Tensor], uniform: Uniform, density: float, seed: int) -> list[Tensor]:
    """The deltas, each element kept with the probability `density` and divided by it, else 0."""
    return [delta / density * (uniform(seed, i, delta.shape) < density) for i, delta in enumerate(deltas)]


def elected_mean(deltas: Sequence[Tensor]) -> Tensor:
    """Elementwise, the mean of those values that have the sign of their sum; zeros are not counted."""
    if len(deltas) == 1:
        return deltas[0]
    sign = sum(deltas[1:], deltas[0]).sign_()
    total = (deltas[0] * sign).relu_()
    count = total.sign()
    for delta in deltas[1:]:
        agreeing = (delta * sign).relu_()
        total += agreeing
        count += agreeing.sign_()
    return total.mul_(sign).div_(count.clamp_min_(1))


def ranks(delta: Tensor) -> Tensor:
    """The rank of each magnitude within its row, from 0 for the smallest to 1; a vector is one row."""
    rows = delta.abs().reshape(1 if delta.dim() < 2 else len(delta), -1)
    order = rows.argsort(dim=1, stable=True).argsort(dim=1)
    return (order / max(1, rows.shape[1] - 1)).to(delta.dtype).reshape(delta.shape)
