"""The delta of a LoRA layer of any kind, as a matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sdft.formats.lora_layer import DORA, Layer
from sdft.formats.rotation import BLOCKS, RESCALE, rotation_change


def lora_delta(layer: Layer) -> Tensor:
    """fp32 rows x columns: the delta of a layer; for a DoRA, before the rows are rescaled (`dora_delta`).

    Not of a rotation, whose delta is `rotation_delta`.
    """
    tensors = {name: tensor.float() for name, tensor in layer.tensors.items()}
    if layer.kind == "loha":
        product = loha_factor(tensors, "1") * loha_factor(tensors, "2")
    elif layer.kind == "lokr":
        product = kronecker(lokr_factor(tensors, "1"), lokr_factor(tensors, "2"))
    elif "lora_mid.weight" in tensors:
        down, up = tensors["lora_down.weight"].flatten(1), tensors["lora_up.weight"].flatten(1)
        product = torch.einsum("or,rshw,si->oihw", up, tensors["lora_mid.weight"], down)
    else:
        product = tensors["lora_up.weight"].flatten(1) @ tensors["lora_down.weight"].flatten(1)
    return product.flatten(1) * layer.scale


def dora_delta(layer: Layer, delta: Tensor, base: Tensor, rows: slice) -> Tensor:
    """The delta of a DoRA for some rows of a weight: `base` + `delta`, with each row rescaled to its trained norm."""
    moved = base + delta
    norms = moved.flatten(1).norm(dim=1)
    magnitude = layer.tensors[DORA].flatten()[rows].to(base.dtype)
    return moved * (magnitude / norms).reshape(-1, *[1] * (base.dim() - 1)) - base


def rotation_delta(layer: Layer, base: Tensor) -> Tensor:
    """The delta of an OFT or BOFT for a whole weight."""
    tensors = {name: tensor.to(base.dtype) for name, tensor in layer.tensors.items()}
    return rotation_change(base, tensors[BLOCKS], tensors.get(RESCALE), layer.alpha)


def loha_factor(tensors: Mapping[str, Tensor], i: str) -> Tensor:
    """Factor 1 or 2 of a LoHa, whose delta is their elementwise product."""
    a, b = tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"]
    if f"hada_t{i}" in tensors:  # LyCORIS: here a is rank x out, b rank x in
        return torch.einsum("rshw,ro,si->oihw", tensors[f"hada_t{i}"], a, b)
    return a @ b


def lokr_factor(tensors: Mapping[str, Tensor], i: str) -> Tensor:
    """Factor 1 or 2 of a LoKr, whose delta is their Kronecker product."""
    if f"lokr_w{i}" in tensors:
        return tensors[f"lokr_w{i}"]
    a, b = tensors[f"lokr_w{i}_a"], tensors[f"lokr_w{i}_b"]
    if f"lokr_t{i}" in tensors:
        return torch.einsum("rshw,ro,si->oihw", tensors[f"lokr_t{i}"], a, b)
    return a @ b


def kronecker(a: Tensor, b: Tensor) -> Tensor:
    """The Kronecker product of two matrices, or of a matrix and a convolution kernel."""
    dims = max(a.dim(), b.dim())
    return torch.kron(*(t.reshape(*t.shape, *[1] * (dims - t.dim())) for t in (a, b)))
