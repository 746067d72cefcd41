"""Writes a recipe whose result is a delta as a LoRA: the delta of every layer becomes factors of a chosen rank.

Knows which weights a LoRA can change; `low_rank` has the decompositions.
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
from sdft.formats.adapter_metadata import ADAPTER_METADATA, adapter_metadata
from sdft.formats.lora_file import diffusers_tensors, kohya_tensors
from sdft.formats.lora_keys import is_convolution, kohya_name
from sdft.formats.lora_layer import DORA, DOWN, MID, UP, Layer, LoraFile, with_one_alpha
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
"""Of the randomised SVD; it changes the result by less than the approximation error."""
Pair = tuple[Tensor, Tensor]


@dataclass
class ExtractedLora:
    """A LoRA, and its approximation errors."""

    layers: dict[str, Layer] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    """By layer: the relative error |delta - up @ down| / |delta|."""
    unrepresentable: list[str] = field(default_factory=list)
    """Weights that differ but cannot be changed by a LoRA: biases, norms, embeddings, the VAE."""

    @property
    def lora(self) -> LoraFile:
        return LoraFile(dict(sorted(self.layers.items())))


def output_layers(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """`part/module` -> shape of its weight, for every layer that the result may change."""
    if recipe.models:
        views = recipe.models[0].checkpoint.weights
        return {layer: view.shape for weight, view in views.items() if (layer := layer_of_weight(weight)) is not None}
    found: dict[str, tuple[int, ...]] = {}
    for adapter in recipe.adapters:
        if adapter.lora.vectors:
            problem = "has trained norms or biases, which are no products; bake it into a model (merge=bake)"
            raise UserError(f"{adapter.where}: {problem}")
        for name, lora_layer in adapter.lora.layers.items():
            rows, columns = lora_layer.delta_shape
            assert columns is not None, "open_recipe refuses a rotation without a base"
            side = 1 if name.endswith("conv_shortcut") else 3
            found[name] = (rows, columns // side**2, side, side) if is_convolution(name) else (rows, columns)
    return found


def layer_of_weight(weight: str) -> str | None:
    """The LoRA layer that changes a weight; None if LoRA files have none."""
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
            refuse_nonfinite([factor for pair in pairs for factor in pair], weight)
            factors = best_low_rank_of_sum(pairs, rank, energy) if pairs else None
        else:
            matrix = torch.cat(list(MergedWeight(recipe, inputs.readers, weight, shape).chunks())).flatten(1).float()
            refuse_nonfinite([matrix], weight)
            generator = rng.generator(SEED, "extract", name)
            factors = best_low_rank(matrix, rank, energy, generator) if matrix.any() else None
        inputs.release(weight)
        bar.update()
        if factors is not None:
            up, down, found.errors[name] = factors
            found.layers[name] = as_file_layer(up, down, shape, dtype)

    def refuse_nonfinite(tensors: list[Tensor], weight: str) -> None:
        if not all(torch.stack(torch.aminmax(tensor)).isfinite().all() for tensor in tensors):
            raise UserError(nonfinite_message(recipe, inputs.readers, weight))

    def note_if_changed(weight: str, shape: tuple[int, ...]) -> None:
        if any(chunk.any() for chunk in MergedWeight(recipe, inputs.readers, weight, shape).chunks()):
            found.unrepresentable.append(weight)
        inputs.release(weight)

    jobs: list[Callable[[], None]] = [partial(factor, name, shape) for name, shape in layers.items()]
    if recipe.models:
        views = recipe.models[0].checkpoint.weights
        others = {weight: view.shape for weight, view in views.items() if layer_of_weight(weight) is None}
        jobs += [partial(note_if_changed, weight, shape) for weight, shape in others.items()]
    run_in_threads(jobs, threads)
    found.unrepresentable.sort()
    return found


def as_file_layer(up: Tensor, down: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Layer:
    """The factors in the shapes of LoRA files, for a weight of `shape`; alpha is the rank, so the scale is 1."""
    rank = len(down)
    kernel = [1] * (len(shape) - 2)
    tensors = {
        DOWN: down.reshape(rank, *shape[1:]).to(dtype).contiguous(),
        UP: up.reshape(-1, rank, *kernel).to(dtype).contiguous(),
    }
    return Layer(tensors, float(rank))


def exact_factors(recipe: Recipe, name: str, layer: str) -> list[Pair] | None:
    """(up, down) whose products sum to the value of a step or source; None if it is not a sum of plain LoRAs."""
    source = recipe.sources.get(name)
    if isinstance(source, Adapter):
        adapter = source.layer_of(f"{layer}.weight")
        return [] if adapter is None else lora_factors(adapter)
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
    """The factors of a plain LoRA layer as matrices, multiplied by its scale; None for DoRA, LoHa and LoKr."""
    tensors = layer.tensors
    if UP not in tensors or MID in tensors or DORA in tensors:
        return None
    return [(tensors[UP].float().flatten(1) * layer.scale, tensors[DOWN].float().flatten(1))]


def write_lora_file(lora: LoraFile, path: Path, to: str, metadata: Mapping[str, str]) -> None:
    """Write a LoRA, with the same bytes each time: safetensors' own writer does not order the metadata."""
    lora = with_one_alpha(lora) if to == "kohya" else lora
    tensors = dict((kohya_tensors if to == "kohya" else diffusers_tensors)(lora, None))
    all_metadata = {"format": "pt", **metadata}
    if to == "diffusers":
        all_metadata[ADAPTER_METADATA] = json.dumps(adapter_metadata(lora), indent=2, sort_keys=True)
    entries = {name: tensor_info(tensor) for name, tensor in tensors.items()}
    write_tensors(path, entries, all_metadata, tensors.__getitem__)


def report_lines(found: ExtractedLora) -> Iterator[str]:
    """A report of ranks, errors and weights that are not in the LoRA."""
    ranks = sorted(len(layer.tensors[DOWN]) for layer in found.layers.values())
    if ranks:
        yield f"{len(ranks)} layers of rank {ranks[0]} to {ranks[-1]}, median {ranks[len(ranks) // 2]}"
        worst = sorted(found.errors, key=lambda name: -found.errors[name])[:5]
        mean = sum(found.errors.values()) / len(found.errors)
        yield f"relative error of the layers: {mean:.2%} on average; the largest:"
        yield from (f"  {name}: {found.errors[name]:.2%}" for name in worst)
    if found.unrepresentable:
        count, first = len(found.unrepresentable), found.unrepresentable[0]
        yield f"{count} changed weights cannot be stored in a LoRA and are left out, such as {first}"
