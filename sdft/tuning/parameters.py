"""Trainable parameters: listing them, copying values into them, grouping them by part of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdft.distributed.sharding import shard_like
from sdft.errors import UserError

WORDS = "words"
"""The part that the embeddings of new words belong to."""


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The named parameters that require a gradient."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def buffers_beside(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The saved buffers of modules that have a trainable parameter of their own, such as the running statistics of a
    batch normalisation: they change in training too, and a checkpoint without them would not resume it."""
    for place, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            kept = set(module.state_dict()) & dict(module.named_buffers(recurse=False)).keys()
            for leaf in sorted(kept):
                yield f"{place}.{leaf}".lstrip("."), module.get_buffer(leaf)


def learned_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds: the trainable parameters and the buffers beside them, by name."""
    return {name: value.detach() for name, value in (*trainable_parameters(model), *buffers_beside(model))}


@torch.no_grad()
def copy_parameters(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy whole `weights` into the trainable parameters of the same names; each rank of a sharded one its shard."""
    for name, p in trainable_parameters(model):
        p.copy_(shard_like(p, weights[name]))


@torch.no_grad()
def swap_parameters(model: nn.Module, weights: dict[str, Tensor], aside: dict[str, Tensor] | None = None) -> None:
    """Exchange the values of the trainable parameters and of `weights`, of the same names, shapes and shards.

    One parameter at a time: no second copy of all of them is made. Weights of another dtype than their parameter would
    lose bits in its place: they stay, and the parameter's value waits in `aside` for the swap back.
    """
    for name, p in trainable_parameters(model):
        if aside is not None and name in aside:
            p.copy_(aside.pop(name))
            continue
        held = p.detach().clone()
        p.copy_(weights[name])
        if aside is not None and p.dtype != weights[name].dtype:
            aside[name] = held
        else:
            weights[name].copy_(held)


@contextmanager
def exchanged(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the `with`, the trainable parameters are others of these values, whole where the model's are sharded."""
    own = {name: p for name, p in trainable_parameters(model) if p is not weights[name]}
    places = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in own}
    for name, (module, leaf) in places.items():
        module._parameters[leaf] = nn.Parameter(weights[name].to(own[name].device))
    try:
        yield
    finally:
        for name, (module, leaf) in places.items():
            module._parameters[leaf] = own[name]


def parameter_groups(
    model: nn.Module, parts: Sequence[str], lr_scale: Mapping[str, float], lora_plus: float | None = None
) -> list[dict[str, Any]]:
    """Parameter groups of each part, with its `name` and `lr_scale`; vectors have a group of their own without decay.

    Vectors are biases and the weights of norms: weight decay would pull them to no scale at all.
    lora_plus: rate of the upper factors of LoRAs over that of the lower ones; they get a group of their own.
    Raises UserError for a part that is frozen.
    """
    groups: list[dict[str, Any]] = []
    for part in parts:
        named = {name: p for name, p in trainable_parameters(model) if part_of(name) == part}
        if lora_plus is not None and (upper := [name for name in named if ".lora_B." in name]):
            scale = lr_scale.get(part, 1.0) * lora_plus
            groups.append({"name": f"{part}.lora_B", "lr_scale": scale, "params": [named.pop(n) for n in upper]})
        owned = list(named.values())
        if not owned:
            raise UserError(f"tuning: no parameter of {part!r} is trainable")
        common = {"name": part, "lr_scale": lr_scale.get(part, 1.0)}
        matrices, vectors = [p for p in owned if p.ndim > 1], [p for p in owned if p.ndim <= 1]
        if matrices:
            groups.append({"params": matrices, **common})
        if vectors:
            groups.append({"params": vectors, **common, "weight_decay": 0.0})
    return groups


def part_of(parameter_name: str) -> str:
    """The part a parameter belongs to: the submodule of the model, or `words` for embeddings of new words."""
    return WORDS if parameter_name.endswith(".rows_ND") else parameter_name.split(".")[0]
