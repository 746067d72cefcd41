"""What becomes of tensors: each method is a pure function of tensors and numbers, and its annotations say of which.

Tensors are pieces of weights in fp32 (fp64 where an input is), cut along the first axis; what a method must know of
whole tensors, it asks for as a statistic. The methods that thin deltas out are in `sparsify`.
Must not know keys, files or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import acos, sin, sqrt
from typing import Annotated

import torch
from torch import Tensor

from sdft.merging.annotations import (
    BlockFloat,
    BlockFraction,
    Delta,
    Deltas,
    Importances,
    PerInput,
    TaskVector,
    TwoOrMoreTaskVectors,
    Weight,
    Weights,
)
from sdft.merging.statistics import Gram, GramOfDifferences, MeanImportance, Procrustes, channels_last
from sdft.types import NonNegative, Positive

SMALLEST_ANGLE = 1e-3
"""Below it, an arc is its chord to seven digits."""
WEISZFELD_STEPS = 100


def weighted_sum(a: Weight, b: Weight, alpha: BlockFraction = 0.5) -> Weight:
    """(1 - alpha) a + alpha b.

    alpha 0 is `a` and alpha 1 is `b`, bit for bit. Where `a` and `b` are equal the result is their value: a part that
    no training touched comes out of a merge untouched.
    """
    if alpha in (0, 1):
        return b if alpha else a
    return torch.lerp(a, b, alpha)


def linear(models: Weights, shares: Annotated[Sequence[Positive] | None, PerInput("models")] = None) -> Weight:
    """The mean of the models, weighted by `shares`, which are brought to the sum 1; equal where not said."""
    shares = shares or [1.0] * len(models)
    first, total = models[0], sum(shares)
    return first + sum(((m - first) * (s / total) for m, s in zip(models[1:], shares[1:], strict=True)), zero(first))


def fisher(
    models: Weights,
    importances: Annotated[Importances, PerInput("models")],
    mean_importance: MeanImportance,
    floor: NonNegative = 1e-3,
) -> Weight:
    """sum_i F_i w_i / sum_i F_i, number by number, arXiv:2111.09832: F_i is what w_i matters to the loss of model i.

    floor: added to each F, as a share of its mean over the tensor and the models. Where nothing matters, the mean.
    """
    kept = [importance + floor * mean_importance for importance in importances]
    total = sum(kept[1:], kept[0])
    first = models[0]
    shares = [torch.where(total > 0, one / total, 1 / len(models)) for one in kept[1:]]
    return first + sum(((m - first) * share for m, share in zip(models[1:], shares, strict=True)), zero(first))


def difference(a: Weight, b: Weight) -> Delta:
    """a - b."""
    return a - b


def add(base: Weight, delta: Delta, scale: BlockFloat = 1.0) -> Weight:
    """base + scale delta: a LoRA baked into a model."""
    return base if scale == 0 else torch.add(base, delta, alpha=scale)


def sum_of(deltas: Deltas, scales: Annotated[Sequence[float] | None, PerInput("deltas")] = None) -> Delta:
    """The sum of the deltas, each times its scale, 1 where not said; of LoRAs, this is not a sum of their factors."""
    scales = scales or [1.0] * len(deltas)
    return sum((delta * scale for delta, scale in zip(deltas, scales, strict=True)), zero(deltas[0]))


def add_difference(a: Weight, b: Weight, c: Weight, alpha: BlockFloat = 1.0) -> Weight:
    """a + alpha (b - c): what was learned between c and b, added to a."""
    return a if alpha == 0 else torch.add(a, b - c, alpha=alpha)


def train_difference(a: Weight, b: Weight, c: Weight, alpha: BlockFloat = 1.0) -> Weight:
    """a + alpha s (b - c) with s = |b - a| / (|b - c| + |b - a|), number by number.

    As if a had been trained towards b: what a has already is not added again. (supermerger adds 1.8 times as much.)
    """
    learned, left = b - c, (b - a).abs()
    share = left / (learned.abs() + left).clamp_min(torch.finfo(left.dtype).tiny)
    return a if alpha == 0 else torch.add(a, learned * share, alpha=alpha)


def slerp(a: Weight, b: Weight, gram: Gram, alpha: BlockFraction = 0.5) -> Weight:
    """From a to b on the arc between their directions, tensor by tensor; on the chord where the arc is flat."""
    norms = sqrt(float(gram[0, 0])), sqrt(float(gram[1, 1]))
    angle = acos(max(-1.0, min(1.0, float(gram[0, 1]) / (norms[0] * norms[1])))) if all(norms) else 0.0
    if alpha in (0, 1) or sin(angle) < SMALLEST_ANGLE:
        return weighted_sum(a, b, alpha)
    return torch.add(a * (sin((1 - alpha) * angle) / sin(angle)), b, alpha=sin(alpha * angle) / sin(angle))


def model_stock(base: Weight, models: TwoOrMoreTaskVectors, gram: Gram) -> Weight:
    """base + t mean(delta), where t = N cos / (1 + (N - 1) cos) and cos is the mean between two deltas, at least 0.

    Model Stock, arXiv:2403.19522, equation 7: the nearer the models agree, the nearer the result is to their mean.
    """
    n = len(models)
    norms = gram.diagonal().sqrt()
    cosines = gram / (norms[:, None] * norms).clamp_min(1e-300)
    cosine = max(0.0, float(cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))
    return torch.add(base, mean(models), alpha=n * cosine / (1 + (n - 1) * cosine))


def geometric_median(models: Weights, gram: GramOfDifferences) -> Weight:
    """The point whose distances to the models have the smallest sum, tensor by tensor (Weiszfeld's iteration).

    It is a mean of the models with shares that follow from their inner products alone.
    """
    shares = torch.full((len(models),), 1 / len(models), dtype=torch.float64)
    for _ in range(WEISZFELD_STEPS):
        away = torch.eye(len(models), dtype=torch.float64) - shares  # row i: model i minus the point
        distances = ((away @ gram) * away).sum(1).clamp_min(0).sqrt()
        inverse = 1 / distances.clamp_min(1e-9 * float(distances.max()) or 1.0)
        shares = inverse / inverse.sum()
    first = models[0]
    return first + sum(((m - first) * float(s) for m, s in zip(models[1:], shares[1:], strict=True)), zero(first))


def cosine_adaptive(base: Weight, a: TaskVector, b: TaskVector, gram: Gram, alpha: BlockFraction = 1.0) -> Weight:
    """The weighted sum of a and b with the share alpha (1 - cos), cos between their deltas, at least 0.

    Where both learned the same, a stands; where they learned different things, b comes in.
    """
    cosine = float(gram[0, 1]) / max(sqrt(float(gram[0, 0] * gram[1, 1])), 1e-300)
    return base + torch.lerp(a, b, alpha * (1 - max(0.0, min(1.0, cosine))))


def rotate(a: Weight, b: Weight, procrustes: Procrustes, alpha: BlockFraction = 0.5) -> Weight:
    """The weighted sum of a and of b after its input channels were turned to lie nearest to those of a.

    Vectors are not turned. Slow: a singular value decomposition for each matrix.
    """
    if procrustes is None:
        return weighted_sum(a, b, alpha)
    turned = (channels_last(b) @ procrustes[0]) @ procrustes[1]
    kernel = b.shape[2:]
    return weighted_sum(a, turned.reshape(b.shape[0], *kernel, b.shape[1]).movedim(-1, 1), alpha)


def clamp(merged: Weight, models: Weights) -> Weight:
    """`merged` with each number brought into the range that the models' numbers span there."""
    low, high = models[0], models[0]
    for model in models[1:]:
        low, high = torch.minimum(low, model), torch.maximum(high, model)
    return merged.clamp(low, high)


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of tensors; that of equal tensors is exact."""
    return linear(tensors)


def zero(tensor: Tensor) -> Tensor:
    """The number 0 in the tensor's dtype."""
    return torch.zeros((), dtype=tensor.dtype)
