"""Merge methods: pure functions of tensors and numbers. `sparsify` has those that drop weights at random or by size.

A method is called with chunks of weights in fp32 (fp64 where an input is), split along the first axis. What it must
know of whole tensors, it takes as a statistic (`sdft.merging.statistics`). `sdft.merging.annotations.MergeMethod` is
the contract. A function added here can be used in recipes by its name, and as `merge=NAME` with `conf/merge/NAME.yaml`.

A method may also come from any importable module, without a change of sdft. In `my_lab.py`:

    import torch
    from sdft.merging.annotations import BlockFraction, Weight

    def my_merge(a: Weight, b: Weight, alpha: BlockFraction = 0.5) -> Weight:
        # b where it is larger than a, mixed with a
        return torch.lerp(a, torch.maximum(a, b), alpha)

and `merge/my_merge.yaml` in a config folder that is passed with `--config-dir`:

    # @package _global_
    a: ???
    b: ???
    alpha: 0.5
    inputs: {a: "${a}", b: "${b}"}
    method: {_target_: my_lab.my_merge, _partial_: true, alpha: "${alpha}"}

Then `merge=my_merge a=nano b=runs/photo alpha=0.3 out=runs/mine` runs it; in a recipe file it is
`method: my_lab.my_merge`, and in Python `merge({"mine": Step(my_merge, {"a": "nano", "b": "runs/photo"})}, out)`.
Must not depend on names of weights, files or models.
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
"""In radians. Below it, spherical and linear interpolation agree to seven digits."""
WEISZFELD_STEPS = 100


def weighted_sum(a: Weight, b: Weight, alpha: BlockFraction = 0.5) -> Weight:
    """(1 - alpha) a + alpha b.

    alpha 0 gives `a` and alpha 1 gives `b`, bit for bit. Where `a` and `b` are equal, the result is equal to them.
    """
    if alpha in (0, 1):
        return b if alpha else a
    return torch.lerp(a, b, alpha)


def linear(models: Weights, shares: Annotated[Sequence[Positive] | None, PerInput("models")] = None) -> Weight:
    """The mean of the models, weighted by `shares`, which are normalised to sum to 1; by default the plain mean."""
    shares = shares or [1.0] * len(models)
    first, total = models[0], sum(shares)
    return first + sum(((m - first) * (s / total) for m, s in zip(models[1:], shares[1:], strict=True)), zero(first))


def fisher(
    models: Weights,
    importances: Annotated[Importances, PerInput("models")],
    mean_importance: MeanImportance,
    floor: NonNegative = 1e-3,
) -> Weight:
    """Fisher-weighted averaging, arXiv:2111.09832: sum_i F_i w_i / sum_i F_i, elementwise; F_i is model i's importance.

    floor: added to each F, as a fraction of the mean of F over the tensor and the models. Where all F are 0, the mean.
    """
    raised = [importance + floor * mean_importance for importance in importances]
    total = sum(raised[1:], raised[0])
    first = models[0]
    shares = [torch.where(total > 0, one / total, 1 / len(models)) for one in raised[1:]]
    return first + sum(((m - first) * share for m, share in zip(models[1:], shares, strict=True)), zero(first))


def difference(a: Weight, b: Weight) -> Delta:
    """a - b."""
    return a - b


def add(base: Weight, delta: Delta, scale: BlockFloat = 1.0) -> Weight:
    """base + scale delta: bakes a LoRA into a model."""
    return base if scale == 0 else torch.add(base, delta, alpha=scale)


def sum_of(deltas: Deltas, scales: Annotated[Sequence[float] | None, PerInput("deltas")] = None) -> Delta:
    """The sum of the deltas, each times its scale (1 by default). For LoRAs it sums the products up @ down."""
    scales = scales or [1.0] * len(deltas)
    return sum((delta * scale for delta, scale in zip(deltas, scales, strict=True)), zero(deltas[0]))


def add_difference(a: Weight, b: Weight, c: Weight, alpha: BlockFloat = 1.0) -> Weight:
    """a + alpha (b - c): adds to a what b learned when it was fine-tuned from c."""
    return a if alpha == 0 else torch.add(a, b - c, alpha=alpha)


def train_difference(a: Weight, b: Weight, c: Weight, alpha: BlockFloat = 1.0) -> Weight:
    """a + alpha s (b - c) with s = |b - a| / (|b - c| + |b - a|), elementwise.

    As if a had been trained towards b: less is added where a is near b already. supermerger's method of this name
    multiplies by a further 1.8.
    """
    learned, remaining = b - c, (b - a).abs()
    share = remaining / (learned.abs() + remaining).clamp_min(torch.finfo(remaining.dtype).tiny)
    return a if alpha == 0 else torch.add(a, learned * share, alpha=alpha)


def slerp(a: Weight, b: Weight, gram: Gram, alpha: BlockFraction = 0.5) -> Weight:
    """Spherical linear interpolation from a to b, tensor by tensor; linear where the angle is below SMALLEST_ANGLE."""
    norms = sqrt(float(gram[0, 0])), sqrt(float(gram[1, 1]))
    angle = acos(max(-1.0, min(1.0, float(gram[0, 1]) / (norms[0] * norms[1])))) if all(norms) else 0.0
    if alpha in (0, 1) or sin(angle) < SMALLEST_ANGLE:
        return weighted_sum(a, b, alpha)
    return torch.add(a * (sin((1 - alpha) * angle) / sin(angle)), b, alpha=sin(alpha * angle) / sin(angle))


def model_stock(base: Weight, models: TwoOrMoreTaskVectors, gram: Gram) -> Weight:
    """base + t mean(delta) with t = N cos / (1 + (N - 1) cos); cos is the mean cosine similarity of two deltas, >= 0.

    Model Stock, arXiv:2403.19522, equation 7: the more the models agree, the closer the result is to their mean.
    """
    n = len(models)
    norms = gram.diagonal().sqrt()
    cosines = gram / (norms[:, None] * norms).clamp_min(1e-300)
    cosine = max(0.0, float(cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))
    return torch.add(base, mean(models), alpha=n * cosine / (1 + (n - 1) * cosine))


def geometric_median(models: Weights, gram: GramOfDifferences) -> Weight:
    """The point with the smallest sum of distances to the models, tensor by tensor (Weiszfeld's algorithm).

    It is a weighted mean of the models; the iteration needs only their inner products.
    """
    shares = torch.full((len(models),), 1 / len(models), dtype=torch.float64)
    for _ in range(WEISZFELD_STEPS):
        offsets = torch.eye(len(models), dtype=torch.float64) - shares  # row i: model i minus the point
        distances = ((offsets @ gram) * offsets).sum(1).clamp_min(0).sqrt()
        inverse = 1 / distances.clamp_min(1e-9 * float(distances.max()) or 1.0)
        shares = inverse / inverse.sum()
    first = models[0]
    return first + sum(((m - first) * float(s) for m, s in zip(models[1:], shares[1:], strict=True)), zero(first))


def cosine_adaptive(base: Weight, a: TaskVector, b: TaskVector, gram: Gram, alpha: BlockFraction = 1.0) -> Weight:
    """The weighted sum of a and b with the weight alpha (1 - cos) for b; cos is their deltas' cosine similarity, >= 0.

    Where both learned the same, the result is a; the more they differ, the more of b is mixed in.
    """
    cosine = float(gram[0, 1]) / max(sqrt(float(gram[0, 0] * gram[1, 1])), 1e-300)
    return base + torch.lerp(a, b, alpha * (1 - max(0.0, min(1.0, cosine))))


def rotate(a: Weight, b: Weight, rotation: Procrustes, alpha: BlockFraction = 0.5) -> Weight:
    """The weighted sum of a and of b, whose input channels are first rotated onto those of a (orthogonal Procrustes).

    Vectors are not rotated. Slow: it needs a singular value decomposition for each matrix.
    """
    if rotation is None:
        return weighted_sum(a, b, alpha)
    rotated = (channels_last(b) @ rotation[0]) @ rotation[1]
    kernel = b.shape[2:]
    return weighted_sum(a, rotated.reshape(b.shape[0], *kernel, b.shape[1]).movedim(-1, 1), alpha)


def clamp(merged: Weight, models: Weights) -> Weight:
    """`merged`, clamped elementwise between the minimum and the maximum of the models."""
    low, high = models[0], models[0]
    for model in models[1:]:
        low, high = torch.minimum(low, model), torch.maximum(high, model)
    return merged.clamp(low, high)


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of tensors; exact where all are equal."""
    return linear(tensors)


def zero(tensor: Tensor) -> Tensor:
    """A scalar 0 in the tensor's dtype."""
    return torch.zeros((), dtype=tensor.dtype)
