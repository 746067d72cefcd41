"""Runs a recipe and writes its result, a model or a LoRA, atomically.

Knows the order of the work: check, then hash and compute in parallel, write, rename. Must not depend on methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sdft import __version__
from sdft.errors import UserError
from sdft.formats.lora_layer import network_metadata
from sdft.formats.metadata import lora_metadata
from sdft.formats.model_checkpoint import INDEX, Checkpoint, Predicts
from sdft.formats.output import atomic_output, full_disk_reported, refuse_to_replace
from sdft.formats.safetensors_io import HASH_KEY
from sdft.merging.annotations import Density, Kind
from sdft.merging.blocks import plot_blocks
from sdft.merging.compute import MergedWeight, nonfinite_message
from sdft.merging.input_files import open_inputs
from sdft.merging.lora_output import ExtractedLora, extract_lora, output_layers, report_lines, write_lora_file
from sdft.merging.model_output import (
    DATE,
    OutputFile,
    plan_lines,
    plan_outputs,
    to_json,
    write_outputs,
)
from sdft.merging.prediction import Prediction, predicts
from sdft.merging.recipe import Recipe, Step, method_name, open_recipe
from sdft.merging.sources import Source
from sdft.progress import tqdm
from sdft.types import DTYPES, NumThreads, Rank

Format = Literal["folder", "single_file", "kohya", "diffusers"]
MODEL_FORMATS, LORA_FORMATS = ("folder", "single_file"), ("kohya", "diffusers")
UNKNOWN = "0" * 64
"""A placeholder for a hash, of the same length."""
HashOf = Callable[[Path], str]


def merge(
    steps: Mapping[str, Step],
    out: str,
    to: Format | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    rank: Rank | None = None,
    energy: Density | None = None,
    config: str = "stabilityai/stable-diffusion-xl-base-1.0",
    threads: NumThreads = 2,
    overwrite: bool = False,
    dry_run: bool = False,
    prediction: Prediction | None = None,
) -> Iterator[str]:
    """Write the result of a recipe to `out`. A generator: it works while it is iterated, and yields lines of a report.

    steps: the recipe. The result is a model if it is a weight, and a LoRA if it is a delta.
    to: `folder` or `single_file` for a model, `kohya` or `diffusers` for a LoRA. By default, a model is a single file
        if `out` ends in .safetensors, and a LoRA has kohya's format.
    dtype: of the written tensors. By default, those of the first model in the recipe, and fp16 for a LoRA.
    rank: the largest rank of a LoRA's layers.
    energy: the fraction of a delta's squared Frobenius norm that each layer of a LoRA keeps, by the smallest rank.
    config: a folder or hub id with the configs and tokenizers that a model folder needs, if no input is a folder.
    threads: number of threads; the written bytes do not depend on it.
    overwrite: replace what is at `out`.
    dry_run: read headers only, and report what would be written.
    prediction: what the result predicts. By default what the inputs do, which must be the same.

    The same recipe gives the same bytes; the metadata holds the recipe and the SHA-256 of all input files.
    Raises UserError, before any weight is read, for everything that is wrong in arguments and headers.
    """
    recipe = open_recipe(steps)
    target = Path(out).expanduser().absolute()
    is_lora = recipe.kind(recipe.result) == Kind.DELTA
    predicted = predicts(recipe, prediction)
    to = format_of(to, target, is_lora)
    refuse_size_options(is_lora, rank, energy)
    refuse_target(target, to, recipe.sources, overwrite)
    if is_lora:
        if dry_run:
            yield from (f"  {name}  {list(shape)}" for name, shape in output_layers(recipe).items())
            yield f"{target}: a LoRA of up to {len(output_layers(recipe))} layers, as {to}"
            return
        found = write_lora(recipe, target, to, dtype or "fp16", rank, energy, threads, overwrite, predicted)
        yield from report_lines(found)
    else:
        like = replace(recipe.models[0].checkpoint, told=predicted)
        outputs = plan_outputs(like, to, DTYPES[dtype] if dtype else None)
        if dry_run:
            yield from plan_lines(outputs)
            yield from (f"reads {one.where}: {file_bytes(one) / 2**20:.1f} MiB" for one in recipe.sources.values())
            return
        folder = config_folder(recipe, config) if to == "folder" else None
        write_model(recipe, target, like, outputs, folder, threads, overwrite)
    if by_block := recipe.numbers_by_block():
        picture = target.with_name(f"{target.stem}.blocks.png")
        plot_blocks(by_block, picture)
        yield f"{picture}: bar chart of the numbers by block"


def format_of(to: Format | None, target: Path, is_lora: bool) -> Format:
    """The output format. Raises UserError where `to`, `out` and the recipe contradict each other."""
    if to is None:
        to = "kohya" if is_lora else "single_file" if target.suffix == ".safetensors" else "folder"
    if (to in LORA_FORMATS) != is_lora:
        what, formats = ("a delta, so a LoRA", LORA_FORMATS) if is_lora else ("a whole model", MODEL_FORMATS)
        raise UserError(f"to={to}: the result is {what}; its formats are {' and '.join(formats)}")
    if (target.suffix == ".safetensors") == (to == "folder"):
        expected = "a folder, without .safetensors" if to == "folder" else "a file that ends in .safetensors"
        raise UserError(f"out={target}: the result is {expected}")
    return to


def refuse_size_options(is_lora: bool, rank: int | None, energy: float | None) -> None:
    """Raise UserError for a LoRA without rank and energy, and for a model with one of them."""
    if is_lora and rank is None and energy is None:
        raise UserError("rank is not set: the result is a LoRA; pass rank=32, or energy=0.9 for ranks by layer")
    if not is_lora and (rank is not None or energy is not None):
        raise UserError("rank and energy apply to LoRAs, and the result is a whole model; leave them out")


def refuse_target(target: Path, to: str, sources: Mapping[str, Source], overwrite: bool) -> None:
    """Raise UserError if `out` is inside an input or the other way round, or exists and must not be replaced."""
    for source in sources.values():
        root, resolved = source.root.resolve(), target.resolve()
        if resolved.is_relative_to(root) or root.is_relative_to(resolved):
            raise UserError(f"out={target}: contains the input {source.where} or is inside it; choose another path")
    refuse_to_replace(target, "out", overwrite)
    if target.exists() and not ((target / INDEX).is_file() if to == "folder" else target.is_file()):
        raise UserError(f"out={target}: is not a model, so it is not overwritten")


def config_folder(recipe: Recipe, config: str) -> Path:
    """The folder to copy configs and tokenizers from: the first input that is a folder, else `config`."""
    for model in recipe.models:
        if model.checkpoint.is_folder:
            return model.root
    from sdft.models.load import CONFIGS, find_folder  # imports diffusers, which takes seconds

    return find_folder("config", config, CONFIGS)


def write_model(
    recipe: Recipe,
    target: Path,
    like: Checkpoint,
    outputs: list[OutputFile],
    config: Path | None,
    threads: int,
    overwrite: bool,
) -> None:
    """Compute and write a whole model, while threads hash the inputs."""
    to_write = sum(output.num_bytes for output in outputs)
    total = to_write + sum(map(file_bytes, recipe.sources.values()))
    with (
        atomic_output(target, "out", overwrite, to_write) as written,
        tqdm(total=total, desc="merging", unit="B", unit_scale=True, leave=False) as bar,
        open_inputs(recipe.sources, bar, to_write) as inputs,
    ):

        def chunks(weight: str) -> Iterator[Tensor]:
            yield from MergedWeight(recipe, inputs.readers, weight, like.weights[weight].shape).chunks()
            inputs.release(weight)

        if config is not None:
            from sdft.formats.diffusers_folder import copy_all_but_weights  # imports diffusers, which takes seconds

            copy_all_but_weights(like, written, config)
        placeholders = metadata(recipe, lambda file: UNKNOWN)
        explain = partial(nonfinite_message, recipe, inputs.readers)
        final_metadata = partial(metadata, recipe, inputs.hash_of)
        write_outputs(outputs, written, chunks, explain, threads, placeholders, final_metadata, bar)


def write_lora(
    recipe: Recipe,
    target: Path,
    to: str,
    dtype: str,
    rank: int | None,
    energy: float | None,
    threads: int,
    overwrite: bool,
    predicted: Predicts | None,
) -> ExtractedLora:
    """Compute and write a LoRA."""
    with (
        atomic_output(target, "out", overwrite) as written,
        tqdm(desc="hashing", unit="B", unit_scale=True, leave=False) as read,
        tqdm(total=len(output_layers(recipe)), desc="layers", leave=False) as bar,
        open_inputs(recipe.sources, read) as inputs,
    ):
        found = extract_lora(recipe, inputs, rank, energy, DTYPES[dtype], threads, bar)
        if not found.layers:
            raise UserError("the result is zero in every layer of a LoRA, so there is nothing to write")
        errors = {name: round(share, 6) for name, share in sorted(found.errors.items())}
        # Without hash and date: the hash would be of other bytes, and a date would differ between equal runs.
        described = lora_metadata(target.stem)
        if predicted is not None:
            prediction, zero_snr = predicted
            described = lora_metadata(target.stem, prediction, zero_terminal_snr=zero_snr)
        general = {key: value for key, value in described.items() if key not in (HASH_KEY, DATE)}
        own = network_metadata(found.lora) | metadata(recipe, inputs.hash_of) | {"sdft.missed": to_json(errors)}
        size = sum(tensor.nbytes for layer in found.layers.values() for tensor in layer.tensors.values())
        with full_disk_reported(target, "out", size):
            write_lora_file(found.lora, written, to, general | own)
    return found


def metadata(recipe: Recipe, hash_of: HashOf) -> dict[str, str]:
    """The metadata entries of every output file: the recipe, the inputs and their hashes."""
    labels = source_labels(recipe.sources)
    steps = {
        name: {
            "method": method_name(step.method),
            **{key: with_labels(given, labels) for key, given in step.inputs.items()},
            **step.numbers,
        }
        for name, step in recipe.steps.items()
    }
    inputs = {
        labels[name]: {str(file.relative_to(source.folder)): hash_of(file) for file in source.files}
        for name, source in recipe.sources.items()
    }
    content = {"steps": steps, "result": recipe.result, "inputs": inputs, "sdft": __version__}
    return {"modelspec.merged_from": ", ".join(labels.values()), "sdft.merge": to_json(content)}


def with_labels(given: Any, labels: Mapping[str, str]) -> Any:
    """An input, or a list of them, with labels in place of paths; names of steps stay."""
    return labels.get(given, given) if isinstance(given, str) else [labels.get(one, one) for one in given]


def source_labels(sources: Mapping[str, Source]) -> dict[str, str]:
    """The sources' names in metadata: file or folder names without their parents, numbered where they are equal."""
    labels: dict[str, str] = {}
    for name, source in sources.items():
        label = "nano" if name == "nano" else source.root.name
        count = sum(used.split(" #")[0] == label for used in labels.values())
        labels[name] = f"{label} #{count + 1}" if count else label
    return labels


def file_bytes(source: Source) -> int:
    """The total size of an input's files, in bytes."""
    return sum(file.stat().st_size for file in source.files)

