"""Optimizers with checked arguments."""

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
    """AdamW; a group's rate is `lr` times its `lr_scale`."""
    scaled = [{**group, "lr": lr * group["lr_scale"]} for group in groups]
    return torch.optim.AdamW(scaled, lr=lr, betas=tuple(betas), weight_decay=weight_decay, eps=eps, foreach=True)
