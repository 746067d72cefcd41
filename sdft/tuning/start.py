"""Adapters, norms and biases that start from a file: the LoRA of any trainer, in any layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sdft.errors import UserError
from sdft.formats.adapter import ADAPTER, parts_of, refuse_mismatch, weight_name
from sdft.formats.lora_file import read_lora
from sdft.formats.lora_keys import layer_name
from sdft.formats.lora_layer import MID, ROTATIONS, Layer, LoraFile
from sdft.protocols import DiffusionModel

KEY = "tuning.start"


def read_start(file: str, model: DiffusionModel) -> dict[str, Layer]:
    """The layers of a LoRA file, by the names of the model's modules.

    Raises UserError for a file that is missing, is no LoRA, or does not fit the model.
    """
    lora = _read(file)
    names = {
        layer_name(part, name): f"{part}.{name}"
        for part in parts_of(model)
        for name, module in model.get_submodule(part).named_modules()
        if hasattr(module, "weight")
    }
    modules = {name: model.get_submodule(module) for name, module in names.items()}
    weights = {weight_name(name): parameter for name, parameter in model.named_parameters()}
    refuse_mismatch(lora, modules, weights, f"{KEY}={file}")
    return {names[name]: layer for name, layer in lora.layers.items()}


def _read(file: str) -> LoraFile:
    path = Path(file).expanduser()
    path = path / "lora_kohya.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{KEY}={file}: there is no such file")
    return read_lora(path, f"{KEY}={file}")


@torch.no_grad()
def move_vectors(file: str, model: nn.Module, initial: Mapping[str, Tensor]) -> None:
    """Add the file's changes of norms and biases to those that train, whose values before are in `initial`.

    Raises UserError if one of them does not train.
    """
    parameters = dict(model.named_parameters())
    names = {weight_name(name): name for name in initial}
    for weight, change in _read(file).vectors.items():
        if weight not in names:
            key = "train_norms" if "norm" in weight else "train_biases"
            raise UserError(f"{KEY}={file}: has a change of {weight}, which does not train here; set tuning.{key}=true")
        parameters[names[weight]].add_(change.to(parameters[names[weight]]))


@torch.no_grad()
def fill_from(layers: Mapping[str, Layer], model: nn.Module) -> None:
    """Copy the factors of the layers into the adapters of the model, which have their ranks and alphas.

    Raises UserError for layers of another kind than the adapters.
    """
    for name, layer in layers.items():
        adapted = model.get_submodule(name)
        tensors = layer.peft_tensors
        held = {key: getattr(adapted, key) for key in adapted.adapter_layer_names if ADAPTER in getattr(adapted, key)}
        if set(held) != set(tensors) or MID in layer.tensors:
            raise UserError(
                f"{KEY}: {name} is a {layer.kind} with {', '.join(sorted(tensors))}, and the adapters here have "
                f"{', '.join(sorted(held))}; choose the tuning.method of the file"
            )
        for key, value in tensors.items():
            target = held[key][ADAPTER]
            target = target if isinstance(target, torch.Tensor) else target.weight
            if target.shape != value.shape:
                shapes = f"{list(value.shape)} in the file, and {list(target.shape)} here"
                raise UserError(f"{KEY}: {key} of {name} is {shapes}; it cannot be continued")
            target.copy_(value)
        if layer.kind in ROTATIONS:
            adapted.alpha[ADAPTER] = layer.alpha
