"""Two models on disk become one, tensor by tensor.

Knows safetensors, diffusers folders, and how to write so that the target appears whole or not at all. Must not know
what a method does with the numbers (`methods`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from sdft import __version__
from sdft.formats.checkpoint import INDEX
from sdft.formats.diffusers_folder import WEIGHT_FILES
from sdft.formats.stream import Stored, appearing, read_header, sha256, write_tensors
from sdft.merging.methods import weighted_sum
from sdft.models.load import NANO
from sdft.types import Fraction, UserError

ADAPTER_MARKS = ("lora", "hada_", "lokr_")


@dataclass(frozen=True)
class Weights:
    """One input: a model folder or a single file. Keys of a folder start with the component: `unet/conv_in.bias`."""

    root: Path
    tensors: dict[str, Stored]
    metadata: dict[Path, dict[str, str]]
    """What each file says about itself; the keys are the files."""

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.metadata)

    def name_of(self, file: Path) -> str:
        """`unet/diffusion_pytorch_model.safetensors`; the file's own name where the input is one file."""
        return file.relative_to(self.root).as_posix() if self.root.is_dir() else file.name


def merge(a: str, b: str, out: str, alpha: Fraction = 0.5, overwrite: bool = False) -> Path:
    """Write (1 - alpha) a + alpha b to `out`; returns its path.

    a, b: `nano`, a model folder in diffusers format, or a `.safetensors` file; both of the same kind.
    out: a folder or a file, as `a` and `b` are. Everything that is not a weight is a's: configs, tokenizers, scheduler.
    alpha: the share of `b`.
    overwrite: replace `out` where it is a model already.

    The same inputs give the same bytes. Each output file carries the recipe and the SHA-256 of all input files.
    Raises UserError before any weight is read when the inputs do not fit each other, naming every key.
    """
    weights = {"a": open_weights("a", a), "b": open_weights("b", b)}
    refuse_misfit(weights["a"], weights["b"])
    target = Path(out).expanduser().absolute()
    refuse_target(target, weights, overwrite)
    num_bytes = weights["a"].num_bytes * 2 + weights["b"].num_bytes
    with (
        appearing(target, overwrite=overwrite) as written,
        tqdm(total=num_bytes, desc="hashing", unit="B", unit_scale=True, leave=False) as bar,
    ):
        inputs = {
            key: {"name": one.root.name, "sha256": {one.name_of(file): sha256(file, bar) for file in one.metadata}}
            for key, one in weights.items()
        }
        recipe = {"method": "weighted_sum", "alpha": alpha, **inputs, "sdft": __version__}
        bar.set_description("merging")
        write_merged(written, weights["a"], weights["b"], partial(weighted_sum, alpha=alpha), recipe, bar)
    return target


def open_weights(key: str, source: str) -> Weights:
    """What the input `source` holds, from headers alone; `key` names it in errors."""
    root = NANO if source == "nano" else Path(source).expanduser().absolute()
    if root.is_dir():
        files = component_files(f"{key}={source}", root)
    elif root.suffix == ".safetensors" and root.is_file():
        files = [root]
    else:
        wrong = "is no .safetensors file" if root.is_file() else "there is no such file or folder"
        raise UserError(f"{key}={source}: {wrong}; pass nano, a model folder or a .safetensors file")
    tensors: dict[str, Stored] = {}
    metadata = {}
    for file in files:
        stored, metadata[file] = read_header(f"{key}={source}", file)
        for tensor in stored:
            name = f"{file.relative_to(root).parts[0]}/{tensor.name}" if root.is_dir() else tensor.name
            if name in tensors:
                first = tensors[name].file.name
                raise UserError(f"{key}={source}: {name} is in {first} and in {file.name}; leave one of them there")
            tensors[name] = tensor
    if any(mark in name for name in tensors for mark in ADAPTER_MARKS):
        raise UserError(f"{key}={source}: is an adapter; a mean of its factors is not a mean of what they do")
    return Weights(root, tensors, metadata)


def component_files(where: str, folder: Path) -> list[Path]:
    """The weight files of a diffusers folder; every component that is a network must have one."""
    if not (folder / INDEX).is_file():
        run = f"; pass {folder / 'model'}" if (folder / "model" / INDEX).is_file() else ""
        raise UserError(f"{where}: the folder has no {INDEX}, so it is no diffusers model{run}")
    files = []
    for component in components(folder):
        found = sorted(component.glob("*.safetensors"))
        if not found and (component / "config.json").is_file():
            raise UserError(f"{where}: {component.name} has no .safetensors file; pickles are not read")
        files += found
    return files


def components(folder: Path) -> list[Path]:
    """The folders that the index of a diffusers folder names."""
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return [folder / name for name in sorted(index) if not name.startswith("_") and (folder / name).is_dir()]


def refuse_misfit(a: Weights, b: Weights) -> None:
    """Raise UserError that names every key in which two inputs differ."""
    if a.root.is_dir() != b.root.is_dir():
        raise UserError("a and b: one is a folder, the other a single file; bring both into one format")
    if prediction_type(a) != prediction_type(b):
        raise UserError(f"a predicts {prediction_type(a)} and b {prediction_type(b)}: a mean of the two means nothing")
    shared = a.tensors.keys() & b.tensors.keys()
    if not shared:
        raise UserError("a and b have no key in common: they are models of different kinds or formats")
    problems = [f"  only in a: {name}" for name in a.tensors if name not in shared]
    problems += [f"  only in b: {name}" for name in b.tensors if name not in shared]
    for name in (name for name in a.tensors if name in shared):
        x, y = a.tensors[name], b.tensors[name]
        if x.shape != y.shape:
            problems.append(f"  {name}: {list(x.shape)} in a, {list(y.shape)} in b")
        elif ("F" in x.dtype) != ("F" in y.dtype):
            problems.append(f"  {name}: {x.dtype} in a, {y.dtype} in b")
    if problems:
        raise UserError(f"a and b do not fit each other in {len(problems)} keys:\n" + "\n".join(problems))


def prediction_type(weights: Weights) -> str | None:
    """What the UNet of a model folder predicts; a single file does not say."""
    config = weights.root / "scheduler" / "scheduler_config.json"
    if not config.is_file():
        return None
    return json.loads(config.read_text(encoding="utf-8")).get("prediction_type", "epsilon")


def refuse_target(target: Path, weights: dict[str, Weights], overwrite: bool) -> None:
    """Raise UserError when `out` cannot be written, or must not be."""
    to_folder = weights["a"].root.is_dir()
    if (target.suffix == ".safetensors") == to_folder:
        needed = "a folder, without .safetensors" if to_folder else "a file that ends in .safetensors"
        raise UserError(f"out={target}: the result is {needed}")
    for key, one in weights.items():
        root, there = one.root.resolve(), target.resolve()
        if there.is_relative_to(root) or root.is_relative_to(there):
            raise UserError(f"out={target}: lies in {key}, or {key} in it; choose another place")
    if not target.exists():
        return
    if not overwrite:
        raise UserError(f"out={target}: exists already; pass overwrite=true to replace it")
    if not ((target / INDEX).is_file() if to_folder else target.is_file()):
        raise UserError(f"out={target}: is no model, so it is not overwritten")


def write_merged(
    out: Path, a: Weights, b: Weights, method: Callable[[Tensor, Tensor], Tensor], recipe: dict, bar: tqdm
) -> None:
    """Write what `method` makes of the two inputs, in the files of `a`."""
    if a.root.is_dir():
        out.mkdir()
        shutil.copy2(a.root / INDEX, out)
        for component in components(a.root):
            shutil.copytree(component, out / component.name, ignore=shutil.ignore_patterns(*WEIGHT_FILES))
    merged_from = {"modelspec.merged_from": f"{a.root.name}, {b.root.name}"}
    with ExitStack() as stack:
        opened = {f: stack.enter_context(safe_open(f, framework="pt")) for f in (*a.metadata, *b.metadata)}

        def merged(key: str) -> Tensor:
            x, y = (opened[one.file].get_tensor(one.name) for one in (a.tensors[key], b.tensors[key]))
            bar.update(x.nbytes)
            try:
                return method(x, y)
            except UserError as error:
                raise UserError(f"{key}: {error}") from error

        for file, said in a.metadata.items():
            keys = {stored.name: key for key, stored in a.tensors.items() if stored.file == file}
            # A hash of a's weights would be wrong for the result.
            kept = {name: value for name, value in said.items() if "hash" not in name}
            metadata = {"format": "pt", **kept, **merged_from, "sdft.merge": json.dumps(recipe, sort_keys=True)}
            entries = {name: a.tensors[key] for name, key in keys.items()}
            path = out / a.name_of(file) if a.root.is_dir() else out
            write_tensors(path, entries, metadata, compose(merged, keys))


def compose(merged: Callable[[str], Tensor], keys: dict[str, str]) -> Callable[[str], Tensor]:
    """`merged` by the names in one file."""
    return lambda name: merged(keys[name])
