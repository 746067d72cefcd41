"""Adapters that start from a part of the weights: PiSSA and OLoRA.

peft subtracts the first adapter from the frozen weights, which rounds them where they are in half precision or
quantised, and changes what the base computes. Here the weights stay, and the first adapter is subtracted from the
output of the layer: y = W x + s B A x - s B0 A0 x. The gradients are the same.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sdft.errors import UserError

Decomposition = Literal["pissa", "olora"]
NUM_ITERATIONS = 8
"""Of the randomised SVD: with twice the rank, its error is below that of fp32."""


class FirstFactors(nn.Module):
    """The factors with which an adapter started: A0, rank x in, and B0, out x rank."""

    def __init__(self, down: Tensor, up: Tensor):
        super().__init__()
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x.to(self.down.dtype), self.down), self.up)


@torch.no_grad()
def start_from_weight(layer: BaseTunerLayer, adapter: str, method: Decomposition) -> None:
    """Replace the factors of a LoRA by a part of the layer's weight, and subtract it from the layer's output.

    Raises UserError for a convolution.
    """
    base: Any = layer.get_base_layer()
    if isinstance(base, nn.Conv2d):
        raise UserError(f"tuning.init={method}: is defined for linear layers; set tuning.layers=all, or init=gaussian")
    scaling, rank = layer.scaling[adapter], layer.r[adapter]
    down, up = decomposed(base.weight.detach().float(), rank, method)
    if method == "pissa":
        down, up = down / scaling**0.5, up / scaling**0.5
    for name, value in (("lora_A", down), ("lora_B", up)):
        getattr(layer, name)[adapter].weight.copy_(value)
    layer.first_factors = FirstFactors(down, up)

    def subtract(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if module.disable_adapters:
            return output
        return output - (module.scaling[adapter] * module.first_factors(args[0])).to(output.dtype)

    layer.register_forward_hook(subtract)


def decomposed(weight_OI: Tensor, rank: int, method: Decomposition) -> tuple[Tensor, Tensor]:
    """(A, B) of an out x in weight.

    pissa: the largest singular values, their roots in both factors (Meng et al., arXiv:2404.02948).
    olora: the first columns of Q and rows of R of W = Q R (Buyukakyuz, arXiv:2406.01775).
    """
    if method == "olora":
        q, r = torch.linalg.qr(weight_OI)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    u, s, v = torch.svd_lowrank(weight_OI, q=min(2 * rank, *weight_OI.shape), niter=NUM_ITERATIONS)
    root = s[:rank].sqrt()
    return (root[:, None] * v[:, :rank].T).contiguous(), (u[:, :rank] * root).contiguous()
