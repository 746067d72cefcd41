"""Figures of whole tensors that some methods need before they can make the first number: read piece by piece.

Each takes the inputs of a method without `base`, and its numbers. Memory does not grow with the tensor, `turn` aside,
which holds two matrices. Must not know keys, files or models.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from sdft.merging.kinds import Blocks, Statistic

BUCKETS = 2**15
"""Of magnitudes: the upper 16 bits of a positive fp32 number, its sign left out, sort as the number does."""


def gram(blocks: Blocks, **numbers: Any) -> Tensor:
    """fp64 N x N: the inner products of the inputs."""
    total: Tensor | float = 0.0
    for tensors in blocks():
        flat = [tensor.reshape(-1) for tensor in tensors]
        total = total + torch.tensor([[float(torch.dot(x, y)) for y in flat] for x in flat], dtype=torch.float64)
    assert isinstance(total, Tensor)
    return total


def gram_of_differences(blocks: Blocks, **numbers: Any) -> Tensor:
    """fp64 N x N: the inner products of the inputs' differences to the first one."""
    return gram(lambda: (tuple(tensor - tensors[0] for tensor in tensors) for tensors in blocks()))


def thresholds(blocks: Blocks, density: float, **numbers: Any) -> list[float]:
    """Of each input the magnitude that a share `density` of its numbers reaches.

    Exact: magnitudes are counted by their upper bits, then sorted within the one bucket that holds the answer.
    """
    # torch's bincount lets other threads run, numpy's does not.
    counts, size = torch.zeros((), dtype=torch.int64), 0
    for tensors in blocks():
        counts = counts + torch.stack([torch.bincount(bits_of(t) >> 16, minlength=BUCKETS) for t in tensors])
        size += tensors[0].numel()
    wanted = max(1, round(density * size))
    if wanted == size:
        return [0.0] * len(counts)
    above = counts.flip(1).cumsum(1).flip(1)  # numbers in the bucket or in a larger one
    bucket = [int((one >= wanted).sum()) - 1 for one in above]
    inside: list[list[Tensor]] = [[] for _ in bucket]
    for tensors in blocks():
        for found, tensor, one in zip(inside, tensors, bucket, strict=True):
            bits = bits_of(tensor)
            found.append(bits[bits >> 16 == one])
    result = []
    for i, found in enumerate(inside):
        larger = int(above[i, bucket[i] + 1]) if bucket[i] + 1 < BUCKETS else 0
        ordered = torch.cat(found).sort(descending=True).values
        result.append(float(ordered[wanted - larger - 1].view(torch.float32)))
    return result


def mean_importance(blocks: Blocks, **numbers: Any) -> float:
    """The mean of all numbers of the importances, which are the second half of the inputs."""
    total, size = 0.0, 0
    for tensors in blocks():
        importances = tensors[len(tensors) // 2 :]
        total += sum(float(tensor.sum(dtype=torch.float64)) for tensor in importances)
        size += sum(tensor.numel() for tensor in importances)
    return total / size


def bits_of(tensor: Tensor) -> Tensor:
    """The magnitudes' bits: int32 that sort as the fp32 magnitudes do."""
    return tensor.float().abs().reshape(-1).view(torch.int32)


def turn(blocks: Blocks, **numbers: Any) -> tuple[Tensor, Tensor] | None:
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
Turn = Annotated[tuple[Tensor, Tensor] | None, Statistic(turn)]
