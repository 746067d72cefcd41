"""Stacks several LoRAs, each with a strength, into one LoRA. Must not depend on files or models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sdft.errors import UserError
from sdft.formats.lora_layer import DOWN, MID, ROTATIONS, UP, Layer, LoraFile


def stack_loras(loras: Sequence[tuple[LoraFile, float]], key: str) -> LoraFile:
    """One LoRA whose delta is the exact sum of the deltas times their strengths; its ranks are the sums of the ranks.

    Changes of norms and biases are added too.

    Raises UserError for a DoRA, OFT or BOFT with a strength other than 1, and for stacks of kinds other than LoRA and
    LoCon.
    """
    loras = [(lora, strength) for lora, strength in loras if strength]
    vectors: dict[str, Tensor] = {}
    for lora, strength in loras:
        for weight, change in lora.vectors.items():
            scaled = change.float() * strength
            vectors[weight] = vectors[weight] + scaled if weight in vectors else scaled
    if len(loras) == 1:
        lora, strength = loras[0]
        layers = {name: scale_layer(layer, strength, key) for name, layer in lora.layers.items()}
        return LoraFile(layers, lora.metadata, vectors)
    found: dict[str, Layer] = {}
    for lora, strength in loras:
        for name, layer in lora.layers.items():
            layer = scale_layer(layer, strength, key)
            found[name] = add_layers(found[name], layer, key) if name in found else layer
    return LoraFile(found, vectors=vectors)


def scale_layer(layer: Layer, strength: float, key: str) -> Layer:
    """The layer with its delta multiplied by `strength`."""
    if strength == 1:
        return layer
    if layer.kind == "dora" or layer.kind in ROTATIONS:
        kind = {"dora": "DoRA"}.get(layer.kind, layer.kind.upper())
        remedy = "bake it into the model with python -m sdft.merging"
        raise UserError(f"{key}: the strength of a {kind} must be 1; {remedy}")
    if layer.rank is None:  # a LoKr of two full matrices is not scaled by alpha
        return replace(layer, tensors={**layer.tensors, "lokr_w1": layer.tensors["lokr_w1"] * strength})
    return replace(layer, alpha=layer.alpha * strength)


def add_layers(a: Layer, b: Layer, key: str) -> Layer:
    """(up_a down_a) s_a + (up_b down_b) s_b as one product, by concatenating the factors."""
    if not {a.kind, b.kind} <= {"lora", "locon"} or MID in a.tensors or MID in b.tensors:
        raise UserError(f"{key}: {a.kind} and {b.kind} cannot be stacked; merge them with python -m sdft.merging")
    down = torch.cat([a.tensors[DOWN].float(), b.tensors[DOWN].float()])
    up = torch.cat([a.tensors[UP].float() * a.scale, b.tensors[UP].float() * b.scale], dim=1)
    return Layer({DOWN: down, UP: up}, alpha=float(len(down)))
