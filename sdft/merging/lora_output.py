"""A recipe whose result is a delta, as a LoRA: every layer's change becomes factors of a chosen rank.

Knows which weights a LoRA can change; the decompositions are `factors`'.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sdft import rng
from sdft.errors import UserError
from sdft.formats.lora_file import ADAPTER_METADATA, adapter_metadata, diffusers_tensors, kohya_tensors
from sdft.formats.lora_keys import is_convolution, kohya_name
from sdft.formats.lora_layer import DORA, DOWN, MID, UP, Layer, LoraFile
from sdft.formats.safetensors_io import tensor_info, write_tensors
from sdft.merging import methods
from sdft.merging.compute import MergedWeight, nonfinite_message
from sdft.merging.input_files import OpenInputs
from sdft.merging.low_rank import best_low_rank, best_low_rank_of_sum
from sdft.merging.model_output import run_in_threads
from sdft.merging.recipe import Recipe
from sdft.merging.sources import Adapter
from sdft.progress import tqdm

SEED = 0
"""Of the random ranges of decompositions; it moves the result by less than their error."""
Pair = tuple[Tensor, Tensor]


@dataclass
class ExtractedLora:
    """A LoRA, and what it misses."""

    layers: dict[str, Layer] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    """By layer: the norm of what the factors miss, as a share of the change's norm."""
    unrepresentable: list[str] = field(default_factory=list)
    """Weights that change and for which LoRAs have no place: biases, norms, embeddings, the VAE."""

    @property
    def lora(self) -> LoraFile:
        return LoraFile(dict(sorted(self.layers.items())))


def output_layers(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """`part/module` -> shape of its weight, of every layer that the result may change."""
    if recipe.models:
        views = recipe.models[0].checkpoint.weights
        return {layer: view.shape for weight, view in views.items() if (layer := layer_of_weight(weight)) is not None}
    found: dict[str, tuple[int, ...]] = {}
    for adapter in recipe.adapters:
        for name, held in adapter.lora.layers.items():
            rows, columns = held.delta_shape
            side = 1 if name.endswith("conv_shortcut") else 3
            found[name] = (rows, columns // side**2, side, side) if is_convolution(name) else (rows, columns)
    return found


def layer_of_weight(weight: str) -> str | None:
    """The layer of LoRA files that changes a weight."""
    layer = weight.removesuffix(".weight")
    try:
        kohya_name(layer)
    except KeyError:
        return None
    return layer if weight.endswith(".weight") else None


@torch.no_grad()
def extract_lora(
    recipe: Recipe,
    inputs: OpenInputs,
    rank: int | None,
    energy: float | None,
    dtype: torch.dtype,
    threads: int,
    bar: tqdm,
) -> ExtractedLora:
    """The result as a LoRA with factors in `dtype`."""
    found, layers = ExtractedLora(), output_layers(recipe)

    def factor(name: str, shape: tuple[int, ...]) -> None:
        pairs, weight = exact_factors(recipe, recipe.result, name), f"{name}.weight"
        if pairs is not None:
            refuse_odd([factor for pair in pairs for factor in pair], weight)
            made = best_low_rank_of_sum(pairs, rank, energy) if pairs else None
        else:
            matrix = torch.cat(list(MergedWeight(recipe, inputs.readers, weight, shape).chunks())).flatten(1).float()
            refuse_odd([matrix], weight)
            generator = rng.generator(SEED, "extract", name)
            made = best_low_rank(matrix, rank, energy, generator) if matrix.any() else None
        inputs.release(weight)
        bar.update()
        if made is not None:
            up, down, found.errors[name] = made
            found.layers[name] = as_file_layer(up, down, shape, dtype)

    def refuse_odd(tensors: list[Tensor], weight: str) -> None:
        if not all(torch.stack(torch.aminmax(tensor)).isfinite().all() for tensor in tensors):
            raise UserError(nonfinite_message(recipe, inputs.readers, weight))

    def look(weight: str, shape: tuple[int, ...]) -> None:
        if any(piece.any() for piece in MergedWeight(recipe, inputs.readers, weight, shape).chunks()):
            found.unrepresentable.append(weight)
        inputs.release(weight)

    jobs: list[Callable[[], None]] = [partial(factor, name, shape) for name, shape in layers.items()]
    if recipe.models:
        views = recipe.models[0].checkpoint.weights
        jobs += [partial(look, weight, view.shape) for weight, view in views.items() if layer_of_weight(weight) is None]
    run_in_threads(jobs, threads)
    found.unrepresentable.sort()
    return found


def as_file_layer(up: Tensor, down: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Layer:
    """The factors in the shapes that files have, for a weight of `shape`; alpha is the rank, so the scale is 1."""
    rank = len(down)
    kernel = [1] * (len(shape) - 2)
    tensors = {
        DOWN: down.reshape(rank, *shape[1:]).to(dtype).contiguous(),
        UP: up.reshape(-1, rank, *kernel).to(dtype).contiguous(),
    }
    return Layer(tensors, float(rank))


def exact_factors(recipe: Recipe, name: str, layer: str) -> list[Pair] | None:
    """(up, down) whose products sum to the value of a step or source; None where it has no such form."""
    source = recipe.sources.get(name)
    if isinstance(source, Adapter):
        held = source.layer_of(f"{layer}.weight")
        return [] if held is None else lora_factors(held)
    step = recipe.steps.get(name)
    if step is None or step.method is not methods.sum_of:
        return None
    scales, pairs = step.numbers.get("scales") or [1.0] * len(step.inputs["deltas"]), []
    for scale, (_, one) in zip(scales, step.input_items(), strict=True):
        found = exact_factors(recipe, one, layer)
        if found is None:
            return None
        pairs += [(up * scale, down) for up, down in found]
    return pairs


def lora_factors(layer: Layer) -> list[Pair] | None:
    """A LoRA layer's factors as matrices, its scale multiplied in; None for other kinds."""
    held = layer.tensors
    if UP not in held or MID in held or DORA in held:
        return None
    return [(held[UP].float().flatten(1) * layer.scale, held[DOWN].float().flatten(1))]


def write_lora_file(lora: LoraFile, path: Path, to: str, metadata: Mapping[str, str]) -> None:
    """Write a LoRA in the same bytes each time; safetensors' own writer puts metadata in an order of chance."""
    tensors = dict((kohya_tensors if to == "kohya" else diffusers_tensors)(lora, None))
    said = {"format": "pt", **metadata}
    if to == "diffusers":
        said[ADAPTER_METADATA] = json.dumps(adapter_metadata(lora), indent=2, sort_keys=True)
    write_tensors(path, {name: tensor_info(tensor) for name, tensor in tensors.items()}, said, tensors.__getitem__)


def report_lines(found: ExtractedLora) -> Iterator[str]:
    """What was kept and what was not, in lines."""
    ranks = sorted(len(layer.tensors[DOWN]) for layer in found.layers.values())
    if ranks:
        yield f"{len(ranks)} layers of rank {ranks[0]} to {ranks[-1]}, {ranks[len(ranks) // 2]} in the middle"
        worst = sorted(found.errors, key=lambda name: -found.errors[name])[:5]
        mean = sum(found.errors.values()) / len(found.errors)
        yield f"missed of the change, by norm: {mean:.2%} on average; most in:"
        yield from (f"  {name}: {found.errors[name]:.2%}" for name in worst)
    if found.unrepresentable:
        yield f"{len(found.unrepresentable)} changed weights have no place in a LoRA, such as {found.unrepresentable[0]}"
