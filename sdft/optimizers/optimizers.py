"""Optimizers with checked arguments. Any other class of `torch.optim` can be chosen by its own name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt

from sdft.types import NonNegative, Positive

Momentum = Annotated[float, Ge(0), Lt(1)]


def adamw(
    groups: Iterable[dict[str, Any]],
    lr: Positive,
    betas: tuple[Momentum, Momentum] = (0.9, 0.99),
    weight_decay: NonNegative = 0.01,
    eps: Positive = 1e-8,
) -> torch.optim.AdamW:
    """AdamW with multi-tensor updates, on CPUs too."""
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), weight_decay=weight_decay, eps=eps, foreach=True)


def scale_rates(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Multiply the learning rate of each parameter group by its `lr_scale`; returns the same, new optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group["lr_scale"]
    return optimizer
