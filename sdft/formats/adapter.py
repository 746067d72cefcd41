"""Adapters in a model, and its trained norms and biases: exported as a LoRA, and applied from one. New words.

Knows where peft keeps its tensors; `lora_file` knows the file formats.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn

from sdft.errors import UserError
from sdft.formats.keys import hub_name
from sdft.formats.lora_file import Layout, read_names, save_atomically, write_lora_file
from sdft.formats.lora_keys import PARTS, layer_name
from sdft.formats.lora_layer import DORA, DOWN, PEFT_NAMES, ROTATIONS, UP, Layer, LoraFile, kohya_magnitude, misfits
from sdft.formats.rotation import BLOCKS, RotatedLayer

ADAPTER = "default"
"""The adapter name in peft, of trained and of applied adapters."""

KOHYA_NAMES = {name: kohya for kohya, name in PEFT_NAMES.items()}


def write_lora(
    model: nn.Module,
    path: Path,
    dtype: torch.dtype = torch.float16,
    layout: Layout = "diffusers",
    metadata: Mapping[str, str] | None = None,
    initial: Mapping[str, Tensor] | None = None,
) -> None:
    """Save the trained adapters of every part atomically, and with `initial` the trained norms and biases."""
    write_lora_file(lora_from_model(model, initial), path, layout, dtype, metadata)


def lora_from_model(model: nn.Module, initial: Mapping[str, Tensor] | None = None) -> LoraFile:
    """The trained adapters of every part; the tensors are shared with the model.

    initial: values before training of the norms and biases that were trained, by the names of the model's parameters.
    """
    layers = {}
    for part in parts_of(model):
        for module, adapted in model.get_submodule(part).named_modules():
            if isinstance(adapted, BaseTunerLayer):
                layers[layer_name(part, module)] = _layer_of(adapted)
    return LoraFile(layers, vectors=_vectors(model, initial or {}))


def _vectors(model: nn.Module, initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The changes of parameters since `initial`, in fp32, by the names of weights."""
    found, parameters = {}, dict(model.named_parameters())
    for name, before in initial.items():
        trained = parameters[name].detach().float()
        found[weight_name(name)] = trained - before.to(trained)
    return found


def weight_name(parameter: str) -> str:
    """`part/name` of a parameter of a model, with or without adapters, as in files."""
    part, _, name = parameter.partition(".")
    return f"{part}/{hub_name(part, name.replace('.base_layer', ''))}"


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
    weights = {weight_name(name): p for name, p in (model.named_parameters() if lora.vectors else ())}
    refuse_mismatch(lora, modules, weights, key)
    with ExitStack() as stack:
        stack.enter_context(_same_trainable(model))
        for name, change in lora.vectors.items():
            stack.enter_context(_moved(weights[name], change))
        for part in parts_of(model):
            stack.callback(remove_adapters, model.get_submodule(part))
            _inject(model.get_submodule(part), part, lora)
        yield


@contextmanager
def adapters_set_aside(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, the model has no adapters, so that others can be applied; afterwards it has the same ones."""
    parts = [model.get_submodule(part) for part in parts_of(model)]
    adapted = adapted_layers(model)
    configs = [(part, part.peft_config) for part in parts if hasattr(part, "peft_config")]
    for part in parts:
        remove_adapters(part)
    try:
        yield
    finally:
        for name, layer in adapted.items():
            model.set_submodule(name, layer)
        for part, config in configs:
            part.peft_config = config


@contextmanager
def _same_trainable(model: nn.Module) -> Iterator[None]:
    """After the `with`, the same parameters are trainable as before: peft freezes all but its adapters."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


@contextmanager
def _moved(weight: Tensor, change: Tensor) -> Iterator[None]:
    """Adds to a weight inside the `with`; afterwards it has its original bits."""
    with torch.no_grad():
        before = weight.detach().clone()
        weight.copy_(before.float() + change.to(before.device, torch.float32))
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def refuse_mismatch(
    lora: LoraFile, modules: Mapping[str, nn.Module], weights: Mapping[str, Tensor], key: str
) -> None:
    """Raise UserError if a layer has no module, or one of another shape; or a vector no weight."""
    wrong = []
    shapes = {f"{name}.weight": tuple(modules[name].weight.shape) for name in lora.layers if name in modules}
    vector_shapes = {name: tuple(weights[name].shape) for name in lora.vectors if name in weights}
    for name, rows, columns, there, is_vector in misfits(lora, shapes, vector_shapes):
        if there is None:
            wrong.append(f"{name} is missing in the model")
        elif is_vector:
            wrong.append(f"{name} has {rows} numbers, and the model {there[0]} there")
        else:
            size = f"{rows} rows" if columns is None else f"{rows} x {columns} weights"
            wrong.append(f"{name} changes {size}, and the model has {there[0]} x {prod(there[1:])} there")
    if wrong:
        example = f"{len(wrong)} of {len(lora.layers) + len(lora.vectors)} layers, for example {wrong[0]}"
        raise UserError(f"{key}: the LoRA does not fit the base model, which model= chooses ({example})")


def _inject(part_module: nn.Module, part: str, lora: LoraFile) -> None:
    own_names = {layer_name(part, name): name for name, _ in part_module.named_modules()}
    found = {own_names[f"{part}/{name}"]: layer for name, layer in lora.of_part(part).items()}
    for kind in sorted({layer.kind for layer in found.values()}):
        layers = {name: layer for name, layer in found.items() if layer.kind == kind}
        if kind in ROTATIONS:
            for name, layer in layers.items():
                _rotate(part_module, name, layer)
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of another kind
            inject_adapter_in_model(_config(kind, list(layers)), part_module, adapter_name=ADAPTER)
        for name, layer in layers.items():
            _fill(part_module.get_submodule(name), layer)


def _rotate(part_module: nn.Module, name: str, layer: Layer) -> None:
    base = part_module.get_submodule(name)
    rotated = RotatedLayer(base, tuple(layer.tensors[BLOCKS].shape))
    part_module.set_submodule(name, rotated)
    rotated.alpha[ADAPTER] = layer.alpha
    for tensor in layer.tensors:
        value = layer.tensors[tensor].to(base.weight)
        getattr(rotated, tensor)[ADAPTER] = nn.Parameter(value, requires_grad=False)


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
    if getattr(adapted, "use_rslora", {}).get(ADAPTER):
        alpha *= adapted.r[ADAPTER] ** 0.5  # files have s = alpha / rank, and rsLoRA s = alpha / sqrt(rank)
    if (first := getattr(adapted, "first_factors", None)) is not None:
        return without_first(tensors, alpha, first.down, first.up)
    layer = Layer(tensors, alpha)
    if layer.rank is None:
        # Of all programs, only peft scales a LoKr of two full matrices.
        tensors["lokr_w1"] = tensors["lokr_w1"] * (alpha / adapted.r[ADAPTER])
    return layer


def without_first(tensors: Mapping[str, Tensor], alpha: float, down: Tensor, up: Tensor) -> Layer:
    """s B A - s B0 A0 as one LoRA of up to twice the rank.

    Both products are as large as a part of the weight, and training changes them by far less: side by side in the fp16
    of files, their rounding would be larger than their difference. So it is the difference that is decomposed, by the
    QR of both sides and the singular values of a small matrix.
    """
    up_OR = torch.cat([tensors[UP], -up], dim=1).to("cpu", torch.float64)
    down_RI = torch.cat([tensors[DOWN], down]).to("cpu", torch.float64)
    (q_up, r_up), (q_down, r_down) = torch.linalg.qr(up_OR), torch.linalg.qr(down_RI.T)
    u, s, v = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    root = s.sqrt()
    factors = {DOWN: root[:, None] * v @ q_down.T, UP: q_up @ (u * root)}
    kept = {name: factor.to(tensors[name]).contiguous() for name, factor in factors.items()}
    return Layer(kept, alpha * len(root) / len(tensors[DOWN]))


class WordsFile(NamedTuple):
    """The new words of a textual-inversion file. rows: `clip_l` and `clip_g`, each vectors x D, word after word."""

    vectors: dict[str, int]
    rows: dict[str, Tensor]

    def of(self, word: str) -> WordsFile:
        """One of the words."""
        first = sum(num for other, num in list(self.vectors.items())[: list(self.vectors).index(word)])
        rows = {name: rows[first : first + self.vectors[word]] for name, rows in self.rows.items()}
        return WordsFile({word: self.vectors[word]}, rows)


def words_of(model: nn.Module, words: Iterable[str]) -> WordsFile:
    """The embeddings of the new words of a model."""
    rows = {name: rows.detach().to("cpu", torch.float32) for name, rows in model.word_rows.items()}
    return WordsFile({word: model.word_vectors.get(word, 1) for word in words}, rows)


def write_words(words: WordsFile, path: Path) -> None:
    """Save embeddings of new words as `clip_l` and `clip_g`, the textual-inversion format of SDXL.

    Other programs take all rows of a file for one word, named like the file.
    """
    metadata = {"words": "\n".join(words.vectors), "vectors": "\n".join(map(str, words.vectors.values()))}
    save_atomically({name: rows.contiguous() for name, rows in words.rows.items()}, path, metadata)


def read_words(path: Path, key: str = "words") -> WordsFile:
    """The new words of a textual-inversion file of SDXL; of a file that does not name its word, the file's name."""
    names, metadata = read_names(key, path)
    if set(names) != {"clip_l", "clip_g"}:
        raise UserError(f"{key}: {path.name} has no new words of SDXL (clip_l and clip_g)")
    with safe_open(path, framework="pt") as file:
        rows = {name: file.get_tensor(name) for name in names}
    words = metadata["words"].split("\n") if "words" in metadata else [path.stem]
    counts = metadata.get("vectors", "\n".join("1" for _ in words)).split("\n")
    if "words" not in metadata:
        counts = [str(len(rows["clip_l"]))]
    numbers = [int(count) if count.isdigit() else 0 for count in counts]
    fits = len(numbers) == len(words) and all(rows.dim() == 2 and len(rows) == sum(numbers) for rows in rows.values())
    if not fits or not all(words) or not all(numbers) or len(set(words)) < len(words):
        raise UserError(f"{key}: {path.name} has {len(words)} words, and other numbers of embeddings for them")
    return WordsFile(dict(zip(words, numbers, strict=True)), rows)
