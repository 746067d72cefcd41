"""One merge, from config to a model or LoRA on disk: what `python -m sdft.merging` and the Python API call."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

from filelock import FileLock
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdft.config.command import build, check
from sdft.config.trust import as_packages, line_of_key, read_yaml, refuse_package, refuse_untrusted
from sdft.data.scan_cache import user_cache
from sdft.errors import UserError, did_you_mean
from sdft.merging.annotations import Kind, signature_of
from sdft.merging.merge import merge as write
from sdft.merging.merge import metadata
from sdft.merging.recipe import METHODS, Recipe, Step, import_method, open_recipe

Report = Callable[[str], Any]
"""Receives the lines that a command prints."""


@dataclass(frozen=True)
class MergeResult:
    """A finished merge, or with dry_run=true what one would write.

    path: the model folder or file. written: all files that were written. lines: what the command prints.
    """

    path: Path
    written: Sequence[Path]
    lines: Sequence[str]


def merge(cfg: DictConfig, report: Report) -> MergeResult:
    """Run the merge that a checked config describes."""
    path, lines = Path(cfg.out).expanduser().absolute(), []

    def keep(line: str) -> None:
        lines.append(line)
        report(line)

    if "file" in cfg:
        steps = read_recipe(Path(cfg.file), cfg.numbers, as_packages(cfg.trust))
    else:
        steps = {"merged": chosen_step(cfg)}
    for line in build(cfg.write)(steps):
        keep(line)
    if cfg.dry_run:
        return MergeResult(path, [], lines)
    keep(f"{cfg.out}: {'; '.join(starmap(format_step, steps.items()))}")
    subjects = ", ".join(f"{name}: {quote_value(path)}" for name, path in subjects_of(steps, cfg.out).items())
    keep(f"next: compare it with python eval.py subjects={shlex.quote(f'{{{subjects}}}')}")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    blocks = path.with_name(f"{path.stem}.blocks.png")
    return MergeResult(path, [*files, *([blocks] if any(str(blocks) in line for line in lines) else [])], lines)


def chosen_step(cfg: DictConfig) -> Step:
    """The one step of a config with `method` and `inputs`. Raises UserError for what is not a merge method."""
    method = build(cfg.method)
    if not isinstance(method, partial):
        raise UserError("method: has no _partial_: true; write method: {_target_: module.function, _partial_: true}")
    signature_of(method.func)
    inputs: Any = OmegaConf.to_container(cfg.inputs, resolve=True)
    refuse_bad_inputs("", inputs)
    return Step(method.func, inputs, method.keywords)


def read_recipe(file: Path, numbers: Mapping[str, Any], trust: Sequence[str] = ()) -> dict[str, Step]:
    """The steps of a recipe file, with `numbers` in place of its own. Raises UserError that names what is wrong.

    trust: packages whose methods the recipe may name.
    """
    content = read_yaml(file, f"file={file}")
    refuse_untrusted(content, f"file={file}", trust, partial(line_of_key, file))
    try:
        if not isinstance(content, dict) or not isinstance(content.get("steps"), dict):
            raise UserError(f"file={file}: has no `steps:`, each with a method, its inputs and numbers")
        if unknown := [key for key in content if key not in ("steps", "numbers")]:
            raise UserError(f"file={file}: unknown key '{unknown[0]}'; a recipe has steps and numbers")
        recipe = OmegaConf.create(content)
        own = content.get("numbers") or {}
        for key, number in numbers.items():
            if key not in own:
                raise UserError(f"numbers.{key}: {file.name} has no such number{did_you_mean(key, own)}")
            OmegaConf.update(recipe, f"numbers.{key}", number)
        resolved: Any = OmegaConf.to_container(recipe, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"file={file}: {' '.join(str(error).split())}") from error
    if wrong := [name for name, step in resolved["steps"].items() if not isinstance(step, dict)]:
        raise UserError(f"file={file}: steps.{wrong[0]} is no step; write a method, its inputs and numbers below it")
    for name, step in resolved["steps"].items():
        if "." in str(label := step.get("method")):
            key = f"steps.{name}.method"
            refuse_package(label, f"file={file}, line {line_of_key(file, key)}", key, trust)
    return {str(name): read_step(str(name), dict(step)) for name, step in resolved["steps"].items()}


def refuse_bad_inputs(prefix: str, inputs: Mapping[str, Any]) -> None:
    """Raise UserError for an input that is not a string or a list of strings."""
    for key, given in inputs.items():
        if not all(isinstance(one, str) for one in (given if isinstance(given, list) else [given])):
            raise UserError(f"{prefix}{key}={given}: must be nano, a folder, a file or a step, or a list of them")


def read_step(name: str, content: dict[str, Any]) -> Step:
    """One step of a recipe file; its method is built in, or `module.function` of a trusted package."""
    label = content.pop("method", None)
    method = import_method(label) if "." in str(label) else METHODS.get(str(label))
    if method is None:
        guess = did_you_mean(label, METHODS) or f"; methods are {', '.join(METHODS)}, or module.function"
        raise UserError(f"{name}.method={label}: there is no such method{guess}")
    signature = signature_of(method)
    known = [*signature.inputs, *signature.numbers]
    if unknown := [key for key in content if key not in known]:
        guess = did_you_mean(unknown[0], known) or f"; it takes {', '.join(known)}"
        raise UserError(f"{name}.{unknown[0]}: {label} has no such argument{guess}")
    inputs = {key: content.pop(key) for key in signature.inputs if key in content}
    refuse_bad_inputs(f"{name}.", inputs)
    node = {"_target_": f"{method.__module__}.{method.__name__}", "_partial_": True, **content}
    checked = OmegaConf.create({name: node})
    check(checked)
    numbers = OmegaConf.to_container(checked[name])
    assert isinstance(numbers, dict)
    return Step(method, inputs, {str(key): number for key, number in numbers.items() if key in content})


def subjects_of(steps: Mapping[str, Step], out: str) -> dict[str, str]:
    """Names and paths of the inputs and the result, for a comparison by eval.py."""
    paths = dict.fromkeys(one for step in steps.values() for _, one in step.input_items() if one not in steps)
    return dict(zip("abcdefghijklmnopqrstuvwxyz", paths, strict=False)) | {"merged": out}


def format_step(name: str, step: Step) -> str:
    """`merged = weighted_sum(a=nano, b=x, alpha=0.5)`."""
    arguments = ", ".join(f"{key}={given}" for key, given in {**step.inputs, **step.numbers}.items())
    return f"{name} = {step.method.__name__}({arguments})"


def quote_value(path: str) -> str:
    """A path as a value on Hydra's command line, quoted if necessary."""
    return path if re.fullmatch(r"[A-Za-z0-9_./+-]+", path) else json.dumps(path, ensure_ascii=False)


def start_from_merge(node: DictConfig, trust: Sequence[str] = (), dry_run: bool = False) -> DictConfig:
    """The config of a model, with the result of its `merge_recipe` in the place of `weights`.

    The result is what `python -m sdft.merging merge=recipe` writes. It is kept in the user's cache by a hash of the
    recipe and its input files, and written once. dry_run: checks the recipe, and takes the first of its models instead.
    Raises UserError for a recipe that cannot be merged, and for one whose result is a LoRA.
    """
    if not node.get("merge_recipe"):
        return node
    where = f"model.merge_recipe={node.merge_recipe}"
    try:
        steps = read_recipe(Path(node.merge_recipe).expanduser(), {}, trust)
        recipe = open_recipe(steps)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix(f'file={node.merge_recipe}: ')}") from error
    if recipe.kind(recipe.result) != Kind.WEIGHT:
        raise UserError(f"{where}: its result is a LoRA; end it with the method add, or pass the LoRA to model.loras")
    weights = str(recipe.models[0].root) if dry_run else str(merged_once(recipe, steps, node.config, where))
    started = OmegaConf.merge(node, {"weights": weights, "merge_recipe": None})
    assert isinstance(started, DictConfig)
    return started


def merged_once(recipe: Recipe, steps: Mapping[str, Step], config: str, where: str) -> Path:
    """The result of a recipe in the user's cache. Processes that ask for it at the same time wait for the first."""
    address = hashlib.sha256(metadata(recipe, sha256)["sdft.merge"].encode()).hexdigest()[:32]
    as_folder = any(model.checkpoint.is_folder for model in recipe.models)
    out = user_cache() / "merged" / (address if as_folder else f"{address}.safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):
        if not out.exists():
            try:
                for _ in write(steps, str(out), config=config):
                    pass
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
    return out


def sha256(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
