"""What becomes of two tensors: each method is a pure function of tensors and numbers.

Must not know keys, files or models.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdft.types import UserError


def weighted_sum(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) a + alpha b in the dtype of `a`, computed in fp32 (in fp64 where an input is fp64).

    alpha 0 is `a` and alpha 1 is `b`, bit for bit. Where `a` and `b` are equal the result is their value: a part that
    no training touched comes out of a merge untouched. Integers are no weights, so they must be equal.
    """
    if alpha == 0:
        return a
    if alpha == 1:
        return b.to(a.dtype)
    if not (a.is_floating_point() and b.is_floating_point()):
        if not torch.equal(a, b):
            raise UserError("holds integers that differ; only numbers with a fraction can be averaged")
        return a
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return torch.lerp(a.to(wide), b.to(wide), alpha).to(a.dtype)
