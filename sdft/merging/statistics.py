"""Statistics of whole tensors that a merge method needs before the first chunk of its result, read chunk by chunk.

Each is a function of the method's input tensors without `base`, and of its numbers. The aliases at the end of this file
annotate the arguments that receive them. Memory does not grow with the tensor, except in `procrustes`, which holds two
matrices. Must not depend on names of weights, files or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from sdft.merging.annotations import Chunks, Statistic

SAMPLE, SAMPLE_STRIDE = 2**18, 17
"""A threshold is first estimated from every 17th of about so many elements; 17 is prime, so all columns are sampled."""
SAMPLE_MARGIN = 0.02
"""Half the width, as a fraction of the elements, of the interval around the estimate that is searched first."""


def gram(chunks: Chunks, **numbers: Any) -> Tensor:
    """fp64 N x N: the inner products of the inputs."""
    total: Tensor | float = 0.0
    for tensors in chunks():
        flat = [tensor.reshape(-1) for tensor in tensors]
        upper = [[float(torch.dot(x, y)) if i <= j else 0.0 for j, y in enumerate(flat)] for i, x in enumerate(flat)]
        total = total + torch.tensor(upper, dtype=torch.float64)
    assert isinstance(total, Tensor)
    return total + total.triu(1).T


def gram_of_differences(chunks: Chunks, **numbers: Any) -> Tensor:
    """fp64 N x N: the inner products of the differences between each input and the first one."""
    return gram(lambda sample=None: (tuple(tensor - tensors[0] for tensor in tensors) for tensors in chunks(sample)))


def thresholds(chunks: Chunks, density: float, **numbers: Any) -> list[float]:
    """For each input, the smallest magnitude among the fraction `density` of elements with the largest magnitudes.

    Exact: a sample of rows gives an interval, then all magnitudes above it are counted and those inside are sorted.
    """
    sampled = ([magnitudes(tensor)[::SAMPLE_STRIDE] for tensor in tensors] for tensors in chunks(SAMPLE))
    samples = [np.sort(np.concatenate(parts)) for parts in zip(*sampled, strict=True)]
    bounds = [
        (quantile_bound(one, density + SAMPLE_MARGIN, 0.0), quantile_bound(one, density - SAMPLE_MARGIN, np.inf))
        for one in samples
    ]
    found: list[float | None] = [None] * len(samples)
    while None in found:
        counted = count_between(chunks, bounds)
        for i, (size, above, near) in enumerate(counted):
            wanted = max(1, round(density * size))
            if wanted == size:
                found[i] = 0.0
            elif above < wanted <= above + len(near):
                found[i] = float(torch.from_numpy(near).kthvalue(len(near) - (wanted - above) + 1).values)
            else:  # the sampled rows were not representative: search the other side
                tried, bounds[i] = bounds[i], (bounds[i][1], np.inf) if wanted <= above else (0.0, bounds[i][0])
                if bounds[i] == tried:  # NaN or infinity, which is reported when the result is written
                    found[i] = 0.0
    return [one for one in found if one is not None]


def count_between(chunks: Chunks, bounds: Sequence[tuple[float, float]]) -> list[tuple[int, int, np.ndarray]]:
    """For each input: its number of elements, how many magnitudes are >= the upper bound, and those in between."""
    sizes, above = [0] * len(bounds), [0] * len(bounds)
    near: list[list[np.ndarray]] = [[] for _ in bounds]
    for tensors in chunks():
        for i, (tensor, (low, high)) in enumerate(zip(tensors, bounds, strict=True)):
            found = magnitudes(tensor)
            too_large = found >= high
            sizes[i] += len(found)
            above[i] += int(np.count_nonzero(too_large))
            near[i].append(found[np.flatnonzero((found >= low) ^ too_large)])  # 3 times as fast as a mask
    return [(size, count, np.concatenate(parts)) for size, count, parts in zip(sizes, above, near, strict=True)]


def quantile_bound(ordered: np.ndarray, share: float, beyond: float) -> float:
    """The smallest of the fraction `share` of largest values in a sorted sample; `beyond` if share is not in (0, 1)."""
    position = len(ordered) - round(share * len(ordered))
    return float(ordered[position]) if 0 < share < 1 and position < len(ordered) else beyond


def magnitudes(tensor: Tensor) -> np.ndarray:
    """Absolute values, flattened. On a CPU, numpy compares and counts many times faster than torch 2.13."""
    return tensor.reshape(-1).abs().numpy()


def mean_importance(chunks: Chunks, **numbers: Any) -> float:
    """The mean of all elements of the importances, which are the second half of the inputs."""
    total, size = 0.0, 0
    for tensors in chunks():
        importances = tensors[len(tensors) // 2 :]
        total += sum(float(tensor.sum(dtype=torch.float64)) for tensor in importances)
        size += sum(tensor.numel() for tensor in importances)
    return total / size


def procrustes(chunks: Chunks, **numbers: Any) -> tuple[Tensor, Tensor] | None:
    """The orthogonal Q that minimises |b Q - a| (orthogonal Procrustes), as two factors; None for vectors.

    a and b are reshaped to rows x C with the C input channels last. With b'a = U S V', Q = U V'. With fewer rows than
    C, QR decompositions reduce the problem to the number of rows.
    """
    rows, product = [], None
    for a, b in chunks():
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
    """rows x input channels; the kernel positions of a convolution count as rows."""
    return tensor.movedim(1, -1).reshape(-1, tensor.shape[1])


Gram = Annotated[Tensor, Statistic(gram)]
GramOfDifferences = Annotated[Tensor, Statistic(gram_of_differences)]
MeanImportance = Annotated[float, Statistic(mean_importance)]
Thresholds = Annotated[list[float], Statistic(thresholds)]
Procrustes = Annotated[tuple[Tensor, Tensor] | None, Statistic(procrustes)]
