"""Learning-rate schedules, stepped once per optimizer step.

Those of diffusers (`get_scheduler`) are not used: their warm-up starts at a rate of 0, so that the first step trains
nothing, and their cosine has no final rate. After the warm-up the factors are the same bits (a test compares them).
torch's `CosineAnnealingLR` computes each rate from the one before, so that rounding adds up, and has no warm-up.
"""

from __future__ import annotations

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from sdft.types import Fraction, Index


def constant(optimizer: torch.optim.Optimizer, num_steps: int, warmup_steps: Index = 0) -> LambdaLR:
    """The full rate after a linear warm-up."""
    return LambdaLR(optimizer, lambda step: _warmup(step, warmup_steps))


def cosine(
    optimizer: torch.optim.Optimizer, num_steps: int, warmup_steps: Index = 0, final: Fraction = 0.0
) -> LambdaLR:
    """Half a cosine from the full rate to `final` times it at the last step, after a linear warm-up."""

    def factor(step: int) -> float:
        progress = min(max(step - warmup_steps, 0) / max(num_steps - warmup_steps, 1), 1.0)
        return _warmup(step, warmup_steps) * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))

    return LambdaLR(optimizer, factor)


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
