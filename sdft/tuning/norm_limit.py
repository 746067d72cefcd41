"""A limit on how far an adapter can move a weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def limit_norms(layers: Iterable[Any], adapter: str, max_norm: float) -> None:
    """Scale the factors of LoRAs down, both alike, so that no change s B A has a Frobenius norm above `max_norm`.

    The option is `scale_weight_norms` in kohya's scripts. It waits for nothing: norms stay on their device.
    """
    for layer in layers:
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        norm = abs(layer.scaling[adapter]) * product_norm(down.flatten(1), up.flatten(1))
        factor = (max_norm / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp_max(1).sqrt()
        down.mul_(factor)
        up.mul_(factor)


def product_norm(down: Tensor, up: Tensor) -> Tensor:
    """The Frobenius norm of up @ down, from the rank x rank products: |B A|^2 = sum of (B^T B) * (A A^T)."""
    return ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt()
