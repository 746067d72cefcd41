"""Low-rank factorisation: a matrix as a product of two, of a chosen rank or the rank that keeps a share of its energy.

Energy is the sum of squared singular values, which is the squared Frobenius norm. Pure functions of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

OVERSAMPLING, POWER_ITERATIONS = 16, 3
"""Of the randomised SVD (Halko, Martinsson, Tropp 2011, algorithm 4.4)."""
RANDOMIZED_MIN_RATIO = 4
"""If the smaller side of a matrix is less than so many times the size of the random range, a full SVD costs no more."""

Factors = tuple[Tensor, Tensor, float]
"""up, rows x rank; down, rank x columns; the relative error |matrix - up @ down| / |matrix| (Frobenius norms)."""


def best_low_rank(matrix: Tensor, rank: int | None, energy: float | None, generator: torch.Generator) -> Factors:
    """The best approximation of a matrix of rank `rank`, or of the smallest rank that keeps the fraction `energy`.

    With both, the smaller of the two ranks.
    """
    size = (rank or 0) + OVERSAMPLING
    if energy is None and rank is not None and RANDOMIZED_MIN_RATIO * size < min(matrix.shape):
        u, s, v = randomized_svd(matrix, size, generator)
    else:
        u, s, v = gram_svd(matrix)
    # fp64 a few rows at a time: a second copy of a large matrix would be most of the memory.
    total = sum(float(rows.double().square().sum()) for rows in matrix.split(64))
    return truncate(u, s, v, total, rank, energy)


def best_low_rank_of_sum(pairs: Sequence[tuple[Tensor, Tensor]], rank: int | None, energy: float | None) -> Factors:
    """The same for the sum of up @ down over `pairs`, without computing it: QR of both sides and a small SVD."""
    ups, downs = zip(*pairs, strict=True)
    (q_u, r_u), (q_d, r_d) = torch.linalg.qr(torch.cat(ups, 1)), torch.linalg.qr(torch.cat(downs).T)
    u, s, v = torch.linalg.svd(r_u @ r_d.T, full_matrices=False)
    return truncate(q_u @ u, s, v @ q_d.T, float(s.double().square().sum()), rank, energy)


def truncate(u: Tensor, s: Tensor, v: Tensor, total: float, rank: int | None, energy: float | None) -> Factors:
    """Factors from the largest singular values, each of which is split evenly. total: the energy of the matrix."""
    kept = s.double().square().cumsum(0)
    rank = min(rank or len(s), max(1, int((s > s[0] * torch.finfo(s.dtype).eps).sum())))
    if energy is not None:
        rank = min(rank, int((kept < energy * total).sum()) + 1)
    root = s[:rank].clamp_min(0).sqrt()
    error = max(0.0, 1 - float(kept[rank - 1]) / total) ** 0.5 if total else 0.0
    return u[:, :rank] * root, root[:, None] * v[:rank], error


def randomized_svd(matrix: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Approximately the `size` largest singular triplets, by a random range finder with power iterations."""
    q = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], size, generator=generator)).Q
    for _ in range(POWER_ITERATIONS):
        q = torch.linalg.qr(matrix.T @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    u, s, v = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u, s, v


def gram_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular triplets, from the eigenvectors of the smaller Gram matrix: many times cheaper than `svd`."""
    if matrix.shape[0] > matrix.shape[1]:
        u, s, v = gram_svd(matrix.T)
        return v.T, s, u.T
    values, u = torch.linalg.eigh(matrix @ matrix.T)
    s, u = values.flip(0).clamp_min(0).sqrt(), u.flip(1)
    v = u.T @ matrix
    return u, s, v / s[:, None].clamp_min(torch.finfo(s.dtype).tiny)
