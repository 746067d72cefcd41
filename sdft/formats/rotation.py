"""OFT and BOFT: trained rotations of the output channels of a layer, as LyCORIS (4.1) and ComfyUI compute them.

OFT (arXiv:2306.07280) cuts the rows of a weight W into K blocks of N, and multiplies each by an orthogonal matrix:
W'_k = R_k^T W_k, with R = (I + Q)(I - Q)^-1 (Cayley) and Q = B - B^T of trained blocks B, K x N x N. BOFT
(arXiv:2311.06243) multiplies by M sparse rotations one after the other, W' = R_M ... R_1 W, each of which is OFT on
rows in another order, for blocks M x K x N x N. Biases are not rotated.

Not peft's OFT and BOFT (0.21): they rotate the inputs of a layer, OFT through the upper triangles of Q, BOFT with
another order of the rows and a scale of its own. LyCORIS and ComfyUI can read neither.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

BLOCKS, RESCALE = "oft_blocks", "rescale"
"""The tensors of a rotation, by their names in files: B, and factors of the rotated rows, which only LyCORIS trains."""
ADAPTER = "default"


class RotatedLayer(nn.Module, BaseTunerLayer):
    """A linear layer or convolution whose outputs, but for the bias, are rotated; at first by nothing.

    shape: of the blocks: K x N x N for OFT, M x K x N x N for BOFT. They are fp32.

    The base layer may be quantised: only its output is used. Not merged into it, so without peft's `merge`.
    """

    adapter_layer_names = (BLOCKS, RESCALE)
    other_param_names = ("r", "alpha", "scaling")

    def __init__(self, base_layer: nn.Module, shape: tuple[int, ...]):
        super().__init__()
        self.base_layer = base_layer
        device = next(base_layer.parameters()).device
        self.oft_blocks = nn.ParameterDict({ADAPTER: nn.Parameter(torch.zeros(shape, device=device))})
        self.rescale = nn.ParameterDict()
        self.r, self.alpha, self.scaling = {ADAPTER: shape[-1]}, {ADAPTER: 0.0}, {ADAPTER: 1.0}
        self.train(base_layer.training)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Rotate by `scale` (R - I) + I."""
        self.scaling[adapter] = scale

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        axis = 1 if isinstance(self.base_layer, nn.Conv2d) else y.dim() - 1
        bias, rescale = self.base_layer.bias, self.rescale.get(ADAPTER)
        product = y if bias is None else y - bias.to(y.dtype).view(-1, *[1] * (y.dim() - axis - 1))
        settings = self.alpha[ADAPTER], self.scaling[ADAPTER], axis
        return y + rotation_change(product, self.oft_blocks[ADAPTER], rescale, *settings)


def rotation_change(
    y: Tensor, blocks: Tensor, rescale: Tensor | None = None, alpha: float = 0.0, strength: float = 1.0, axis: int = 0
) -> Tensor:
    """What a rotation adds to `y`, whose dimension `axis` has the channels (rows of a weight, or outputs).

    blocks: K x N x N for OFT, M x K x N x N for BOFT.
    rescale: a factor of each channel after the rotation.
    alpha: if positive, Q is scaled down to the norm alpha x channels, as in training by LyCORIS and by kohya's scripts.
        (ComfyUI forgets the number of channels: github.com/Comfy-Org/ComfyUI/pull/15093.)
    strength: of LyCORIS: s (R - I) + I; for BOFT, of each of its rotations. (In ComfyUI, it applies twice:
        github.com/Comfy-Org/ComfyUI/pull/15584.)
    """
    turns = turns_of(blocks, alpha * y.shape[axis]).to(y.dtype) * strength
    if blocks.dim() == 3:
        change = multiply(turns.mT, y, axis)
    else:
        change = torch.zeros_like(y)
        for i, turn in enumerate(turns):
            half = 2**i * blocks.shape[-1] // 2
            ordered = swap_halves(y + change, axis, 2, half)
            change = change + swap_halves(multiply(turn, ordered, axis), axis, half, 2)
    if rescale is None:
        return change
    factor = rescale.flatten().to(y.dtype).view(-1, *[1] * (y.dim() - axis - 1))
    return factor * change + (factor - 1) * y


def turns_of(blocks: Tensor, limit: float = 0.0) -> Tensor:
    """R - I of each block, in fp32 or fp64. limit: the largest norm of all of Q; 0 for none.

    From (I - Q)(R - I) = 2 Q: exactly zero for Q = 0, and without cancellation for small Q. I - Q is never singular.
    """
    blocks = blocks if blocks.dtype == torch.float64 else blocks.float()
    q = blocks - blocks.mT
    if limit > 0:
        q = q * (limit / q.norm().clamp(min=limit))
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    # Not `solve`, which waits for the device to see whether it has failed.
    return torch.linalg.solve_ex(identity - q, 2 * q).result


def multiply(blocks_KNN: Tensor, y: Tensor, axis: int) -> Tensor:
    """y with its channels multiplied by a block-diagonal matrix."""
    before, after = prod(y.shape[:axis]), prod(y.shape[axis + 1 :])
    y_LKNT = y.reshape(before, *blocks_KNN.shape[:2], after)
    return torch.einsum("kij,lkjt->lkit", blocks_KNN, y_LKNT).reshape(y.shape)


def swap_halves(y: Tensor, axis: int, rows: int, columns: int) -> Tensor:
    """y with each group of rows x columns channels transposed."""
    before, after = prod(y.shape[:axis]), prod(y.shape[axis + 1 :])
    return y.reshape(before, -1, rows, columns, after).transpose(2, 3).reshape(y.shape)
