"""Figures of whole tensors that some methods need before they can make the first number: read piece by piece.

Each takes the inputs of a method without `base`, and its numbers. Memory does not grow with the tensor, `procrustes` aside,
which holds two matrices. Must not know keys, files or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from sdft.merging.annotations import Chunks, Statistic

SAMPLE, SAMPLE_STRIDE = 2**18, 17
"""Of so many numbers, in whole rows, each 17th tells where a threshold may lie: a prime, so that columns take turns."""
SAMPLE_MARGIN = 0.02
"""A share of the numbers, to both sides of it, in which a threshold is looked for first."""


def gram(blocks: Chunks, **numbers: Any) -> Tensor:
    """fp64 N x N: the inner products of the inputs."""
    total: Tensor | float = 0.0
    for tensors in blocks():
        flat = [tensor.reshape(-1) for tensor in tensors]
        upper = [[float(torch.dot(x, y)) if i <= j else 0.0 for j, y in enumerate(flat)] for i, x in enumerate(flat)]
        total = total + torch.tensor(upper, dtype=torch.float64)
    assert isinstance(total, Tensor)
    return total + total.triu(1).T


def gram_of_differences(blocks: Chunks, **numbers: Any) -> Tensor:
    """fp64 N x N: the inner products of the inputs' differences to the first one."""
    return gram(lambda sample=None: (tuple(tensor - tensors[0] for tensor in tensors) for tensors in blocks(sample)))


def thresholds(blocks: Chunks, density: float, **numbers: Any) -> list[float]:
    """Of each input the magnitude that a share `density` of its numbers reaches.

    Exact: some rows say about where it lies, then all numbers above are counted and those near it put in order.
    """
    rows = zip(*([magnitudes(tensor)[::SAMPLE_STRIDE] for tensor in tensors] for tensors in blocks(SAMPLE)), strict=True)
    samples = [np.sort(np.concatenate(parts)) for parts in rows]
    bounds = [
        (quantile_bound(one, density + SAMPLE_MARGIN, 0.0), quantile_bound(one, density - SAMPLE_MARGIN, np.inf))
        for one in samples
    ]
    found: list[float | None] = [None] * len(samples)
    while None in found:
        counted = count_between(blocks, bounds)
        for i, (size, above, near) in enumerate(counted):
            wanted = max(1, round(density * size))
            if wanted == size:
                found[i] = 0.0
            elif above < wanted <= above + len(near):
                found[i] = float(torch.from_numpy(near).kthvalue(len(near) - (wanted - above) + 1).values)
            else:  # the rows said little of the others
                tried, bounds[i] = bounds[i], (bounds[i][1], np.inf) if wanted <= above else (0.0, bounds[i][0])
                if bounds[i] == tried:  # NaN or infinity, which is refused where it would be written
                    found[i] = 0.0
    return [one for one in found if one is not None]


def count_between(blocks: Chunks, bounds: Sequence[tuple[float, float]]) -> list[tuple[int, int, np.ndarray]]:
    """Of each input: how many numbers it has, how many magnitudes lie at the upper bound or above, those between."""
    sizes, above = [0] * len(bounds), [0] * len(bounds)
    near: list[list[np.ndarray]] = [[] for _ in bounds]
    for tensors in blocks():
        for i, (tensor, (low, high)) in enumerate(zip(tensors, bounds, strict=True)):
            found = magnitudes(tensor)
            too_large = found >= high
            sizes[i] += len(found)
            above[i] += int(np.count_nonzero(too_large))
            near[i].append(found[np.flatnonzero((found >= low) ^ too_large)])  # a third of the time of a mask
    return [(size, count, np.concatenate(parts)) for size, count, parts in zip(sizes, above, near, strict=True)]


def quantile_bound(ordered: np.ndarray, share: float, beyond: float) -> float:
    """The magnitude that a share of a sample reaches; `beyond` where there is no such share."""
    place = len(ordered) - round(share * len(ordered))
    return float(ordered[place]) if 0 < share < 1 and place < len(ordered) else beyond


def magnitudes(tensor: Tensor) -> np.ndarray:
    """In a row. numpy compares and counts many times faster than torch 2.13 does on a CPU."""
    return tensor.reshape(-1).abs().numpy()


def mean_importance(blocks: Chunks, **numbers: Any) -> float:
    """The mean of all numbers of the importances, which are the second half of the inputs."""
    total, size = 0.0, 0
    for tensors in blocks():
        importances = tensors[len(tensors) // 2 :]
        total += sum(float(tensor.sum(dtype=torch.float64)) for tensor in importances)
        size += sum(tensor.numel() for tensor in importances)
    return total / size


def procrustes(blocks: Chunks, **numbers: Any) -> tuple[Tensor, Tensor] | None:
    """The orthogonal Q, as a product of two factors, that brings b Q nearest to a (Procrustes); none of a vector.

    a and b are seen as rows x C, where C are the input channels. With b'a = U S V' it is Q = U V'; where the rows are
    fewer than C, QR reduces both to the size of the rows.
    """
    rows, product = [], None
    for a, b in blocks():
        if a.dim() < 2:
            return None
        rows.append((channels_last(a), channels_last(b)))
        if sum(len(x) for x, _ in rows) >= a.shape[1]:
            part = sum((y.T @ x for x, y in rows), torch.zeros(()))
            product = part if product is None else product + part
            rows = []
    if product is not None:
        product = sum((y.T @ x for x, y in rows), product)
        u, _, v = torch.linalg.svd(product)
        return u, v
    a, b = (torch.cat(parts) for parts in zip(*rows, strict=True))
    (q_a, r_a), (q_b, r_b) = torch.linalg.qr(a.T), torch.linalg.qr(b.T)
    u, _, v = torch.linalg.svd(r_b @ r_a.T)
    return q_b @ u, v @ q_a.T


def channels_last(tensor: Tensor) -> Tensor:
    """rows x input channels, a convolution's kernel among the rows."""
    return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


Gram = Annotated[Tensor, Statistic(gram)]
GramOfDifferences = Annotated[Tensor, Statistic(gram_of_differences)]
MeanImportance = Annotated[float, Statistic(mean_importance)]
Thresholds = Annotated[list[float], Statistic(thresholds)]
Procrustes = Annotated[tuple[Tensor, Tensor] | None, Statistic(procrustes)]
