"""Optimisers and learning-rate schedules, as functions with checked arguments.

Knows parameter groups with an `lr_scale`; does not know where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch.optim.lr_scheduler import LambdaLR

from sdft.types import Fraction, Index, NonNegative, Positive

Momentum = Annotated[float, Ge(0), Lt(1)]


def adamw(
    groups: Iterable[dict[str, Any]],
    lr: Positive,
    betas: tuple[Momentum, Momentum] = (0.9, 0.99),
    weight_decay: NonNegative = 0.01,
    eps: Positive = 1e-8,
) -> torch.optim.AdamW:
    """AdamW; a group's rate is `lr` times its `lr_scale`."""
    scaled = [{**group, "lr": lr * group["lr_scale"]} for group in groups]
    return torch.optim.AdamW(scaled, lr=lr, betas=tuple(betas), weight_decay=weight_decay, eps=eps, foreach=True)


def constant(optimizer: torch.optim.Optimizer, num_steps: int, warmup_steps: Index = 0) -> LambdaLR:
    """The full rate after a linear warm-up."""
    return LambdaLR(optimizer, lambda step: _warmup(step, warmup_steps))


def cosine(
    optimizer: torch.optim.Optimizer, num_steps: int, warmup_steps: Index = 0, final: Fraction = 0.0
) -> LambdaLR:
    """Half a cosine from the full rate down to `final` times it at the last step, after a linear warm-up."""

    def factor(step: int) -> float:
        progress = min(max(step - warmup_steps, 0) / max(num_steps - warmup_steps, 1), 1.0)
        return _warmup(step, warmup_steps) * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))

    return LambdaLR(optimizer, factor)


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
