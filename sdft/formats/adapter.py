"""peft adapters in a model: exported as a LoRA, and applied from one. Textual-inversion files of new words.

Knows where peft keeps its tensors; `lora_file` knows the file formats.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn

from sdft.errors import UserError
from sdft.formats.lora_file import Layout, read_names, save_atomically, write_lora_file
from sdft.formats.lora_keys import PARTS, layer_name
from sdft.formats.lora_layer import DORA, DOWN, PEFT_NAMES, Layer, LoraFile, kohya_magnitude

ADAPTER = "default"
"""The adapter name in peft, of trained and of applied adapters."""

KOHYA_NAMES = {name: kohya for kohya, name in PEFT_NAMES.items()}


def write_lora(
    model: nn.Module,
    path: Path,
    dtype: torch.dtype = torch.float16,
    layout: Layout = "diffusers",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save the trained adapters of every part atomically."""
    write_lora_file(lora_from_model(model), path, layout, dtype, metadata)


def lora_from_model(model: nn.Module) -> LoraFile:
    """The trained adapters of every part; the tensors are shared with the model."""
    layers = {}
    for part in parts_of(model):
        for module, adapted in model.get_submodule(part).named_modules():
            if isinstance(adapted, BaseTunerLayer):
                layers[layer_name(part, module)] = _layer_of(adapted)
    return LoraFile(layers)


def adapted_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The modules that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def parts_of(model: nn.Module) -> list[str]:
    """The parts of a model that LoRAs change: those of `PARTS` that it has."""
    names = {name for name, _ in model.named_children()}
    return [part for part in PARTS if part in names]


@contextmanager
def applied_lora(model: nn.Module, lora: LoraFile, key: str) -> Iterator[None]:
    """Applies a LoRA at strength 1 inside the `with`; afterwards the model has its original modules and weights.

    Raises UserError, before anything is changed, if the model has no module of the right shape for a layer.
    """
    modules = {
        layer_name(part, name): module
        for part in parts_of(model)
        for name, module in model.get_submodule(part).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    refuse_mismatch(lora, modules, key)
    try:
        for part in parts_of(model):
            _inject(model.get_submodule(part), part, lora)
        yield
    finally:
        for part in parts_of(model):
            remove_adapters(model.get_submodule(part))


def refuse_mismatch(lora: LoraFile, modules: Mapping[str, nn.Module], key: str) -> None:
    """Raise UserError if a layer has no module, or one of another shape."""
    wrong = []
    for name, layer in lora.layers.items():
        rows, columns = layer.delta_shape
        if name not in modules:
            wrong.append(f"{name} is missing in the model")
        elif (rows, columns) != (own := tuple(modules[name].weight.flatten(1).shape)):
            wrong.append(f"{name} changes {rows} x {columns} weights, and the model has {own[0]} x {own[1]} there")
    if wrong:
        example = f"{len(wrong)} of {len(lora.layers)} layers, for example {wrong[0]}"
        raise UserError(f"{key}: the LoRA does not fit the base model, which model= chooses ({example})")


def _inject(part_module: nn.Module, part: str, lora: LoraFile) -> None:
    own_names = {layer_name(part, name): name for name, _ in part_module.named_modules()}
    found = {own_names[f"{part}/{name}"]: layer for name, layer in lora.of_part(part).items()}
    for kind in sorted({layer.kind for layer in found.values()}):
        layers = {name: layer for name, layer in found.items() if layer.kind == kind}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of another kind
            inject_adapter_in_model(_config(kind, list(layers)), part_module, adapter_name=ADAPTER)
        for name, layer in layers.items():
            _fill(part_module.get_submodule(name), layer)


def _config(kind: str, names: list[str]) -> PeftConfig:
    """Adapters of one kind for the modules, of rank 1: `_fill` replaces their tensors."""
    if kind in ("loha", "lokr"):
        return (LoHaConfig if kind == "loha" else LoKrConfig)(r=1, target_modules=names)
    return LoraConfig(r=1, target_modules=names, use_dora=kind == "dora")


@torch.no_grad()
def _fill(adapted: BaseTunerLayer, layer: Layer) -> None:
    """Replace the tensors that peft created by a layer's, in the dtype of the module's weight."""
    base, tensors = adapted.get_base_layer(), layer.peft_tensors
    for name in adapted.adapter_layer_names:
        held = getattr(adapted, name)
        if name not in tensors:
            if ADAPTER in held:
                del held[ADAPTER]
            continue
        tensor = nn.Parameter(tensors[name].to(base.weight), requires_grad=False)
        if isinstance(held, nn.ParameterDict):
            held[ADAPTER] = tensor
        else:
            held[ADAPTER].weight = tensor
    adapted.r[ADAPTER] = layer.rank or 1
    _alphas(adapted)[ADAPTER] = layer.scale * adapted.r[ADAPTER]
    adapted.scaling[ADAPTER] = layer.scale
    adapted.train(base.training)


def remove_adapters(part_module: nn.Module) -> None:
    """Put the base layers back in the place of adapted ones."""
    for name, adapted in list(part_module.named_modules()):
        if isinstance(adapted, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(part_module.get_submodule(parent), child, adapted.get_base_layer())
    if hasattr(part_module, "peft_config"):
        del part_module.peft_config


def _alphas(adapted: BaseTunerLayer) -> dict[str, float]:
    return adapted.lora_alpha if hasattr(adapted, "lora_alpha") else adapted.alpha


def _layer_of(adapted: BaseTunerLayer) -> Layer:
    tensors = {}
    for name in adapted.adapter_layer_names:
        held = getattr(adapted, name)
        if ADAPTER in held:
            tensor = held[ADAPTER] if isinstance(held, nn.ParameterDict) else held[ADAPTER].weight
            tensors[KOHYA_NAMES.get(name, name)] = tensor.detach()
    if DORA in tensors:
        tensors[DORA] = kohya_magnitude(tensors[DORA], tensors[DOWN])
    alpha = float(_alphas(adapted)[ADAPTER])
    layer = Layer(tensors, alpha)
    if layer.rank is None:
        # Of all programs, only peft scales a LoKr of two full matrices.
        tensors["lokr_w1"] = tensors["lokr_w1"] * (alpha / adapted.r[ADAPTER])
    return layer


def write_words(model: nn.Module, words: list[str], path: Path) -> None:
    """Save the embeddings of new words as `clip_l` and `clip_g`, the textual-inversion format of SDXL."""
    tensors = {name: rows.detach().to("cpu", torch.float32).contiguous() for name, rows in model.word_rows.items()}
    save_atomically(tensors, path, {"words": "\n".join(words)})


def read_words(path: Path, key: str = "words") -> tuple[list[str], dict[str, Tensor]]:
    """The new words of a textual-inversion file and their embeddings, `clip_l` and `clip_g`, each N x D."""
    names, metadata = read_names(key, path)
    words = metadata.get("words", "").split("\n")
    if set(names) != {"clip_l", "clip_g"} or not all(words) or len(set(words)) < len(words):
        raise UserError(f"{key}: {path.name} has no new words (clip_l, clip_g and the list of words)")
    with safe_open(path, framework="pt") as file:
        return words, {name: file.get_tensor(name) for name in names}
