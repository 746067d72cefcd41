"""Deltas as LoRAs: a matrix becomes two factors of a chosen rank, or of the rank that keeps a share of its energy.

Pure functions on matrices. Must not know keys, files or models.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

OVERSAMPLING, POWER_ITERATIONS = 16, 3
"""Of the randomised decomposition (Halko, Martinsson, Tropp 2011, algorithm 4.4)."""
RANDOMIZED_MIN_RATIO = 4
"""Where a matrix is less than so many times as wide as the range that is sought, its whole spectrum costs no more."""

Factors = tuple[Tensor, Tensor, float]
"""up, rows x rank; down, rank x columns; the norm of what they miss, as a share of the matrix's norm."""


def best_low_rank(matrix: Tensor, rank: int | None, energy: float | None, generator: torch.Generator) -> Factors:
    """The factors nearest to a matrix: of `rank`, or of the smallest rank that keeps the share `energy` of its squares.

    With both, the rank is the smaller of the two.
    """
    size = (rank or 0) + OVERSAMPLING
    if energy is None and rank is not None and RANDOMIZED_MIN_RATIO * size < min(matrix.shape):
        u, s, v = randomized_svd(matrix, size, generator)
    else:
        u, s, v = gram_svd(matrix)
    # fp64 row by row: a second copy of a large matrix would be most of the memory.
    whole = sum(float(rows.double().square().sum()) for rows in matrix.split(64))
    return truncate(u, s, v, whole, rank, energy)


def best_low_rank_of_sum(pairs: Sequence[tuple[Tensor, Tensor]], rank: int | None, energy: float | None) -> Factors:
    """The same for the sum of up @ down, whose matrix is never made: QR of both sides and a small decomposition."""
    ups, downs = zip(*pairs, strict=True)
    (q_u, r_u), (q_d, r_d) = torch.linalg.qr(torch.cat(ups, 1)), torch.linalg.qr(torch.cat(downs).T)
    u, s, v = torch.linalg.svd(r_u @ r_d.T, full_matrices=False)
    return truncate(q_u @ u, s, v @ q_d.T, float(s.double().square().sum()), rank, energy)


def truncate(u: Tensor, s: Tensor, v: Tensor, whole: float, rank: int | None, energy: float | None) -> Factors:
    """The first singular values, shared evenly between the factors. whole: the sum of all squares of the matrix."""
    kept = s.double().square().cumsum(0)
    rank = min(rank or len(s), max(1, int((s > s[0] * torch.finfo(s.dtype).eps).sum())))
    if energy is not None:
        rank = min(rank, int((kept < energy * whole).sum()) + 1)
    root = s[:rank].clamp_min(0).sqrt()
    error = max(0.0, 1 - float(kept[rank - 1]) / whole) ** 0.5 if whole else 0.0
    return u[:, :rank] * root, root[:, None] * v[:rank], error


def randomized_svd(matrix: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """About the first `size` singular triples, from a random range sharpened by a few passes."""
    q = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], size, generator=generator)).Q
    for _ in range(POWER_ITERATIONS):
        q = torch.linalg.qr(matrix.T @ q).Q
        q = torch.linalg.qr(matrix @ q).Q
    u, s, v = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u, s, v


def gram_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular triples, by the eigenvectors of the smaller Gram matrix, which is many times cheaper."""
    if matrix.shape[0] > matrix.shape[1]:
        u, s, v = gram_svd(matrix.T)
        return v.T, s, u.T
    values, u = torch.linalg.eigh(matrix @ matrix.T)
    s, u = values.flip(0).clamp_min(0).sqrt(), u.flip(1)
    v = u.T @ matrix
    return u, s, v / s[:, None].clamp_min(torch.finfo(s.dtype).tiny)
