"""One merge, from config to a model or LoRA on disk: what `python -m sdft.merging` and the Python API call."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdft.config.command import build, check
from sdft.config.keys import did_you_mean
from sdft.errors import UserError
from sdft.merging.annotations import signature_of
from sdft.merging.recipe import METHODS, Step

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

    steps = read_recipe(Path(cfg.file), cfg.numbers) if "file" in cfg else {"merged": chosen_step(cfg)}
    for line in build(cfg.write)(steps):
        keep(line)
    if cfg.dry_run:
        return MergeResult(path, [], lines)
    keep(f"{cfg.out}: {'; '.join(map(in_words, steps.items()))}")
    subjects = ", ".join(f"{name}: {quote_value(path)}" for name, path in subjects_of(steps, cfg.out).items())
    keep(f"next: look at it with python eval.py subjects={shlex.quote(f'{{{subjects}}}')}")
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    blocks = path.with_name(f"{path.stem}.blocks.png")
    return MergeResult(path, [*files, *([blocks] if any(str(blocks) in line for line in lines) else [])], lines)


def chosen_step(cfg: DictConfig) -> Step:
    """The step that `merge=` chose."""
    method = build(cfg.method)
    inputs: Any = OmegaConf.to_container(cfg.inputs, resolve=True)
    refuse_bad_inputs("", inputs)
    return Step(method.func, inputs, method.keywords)


def read_recipe(file: Path, numbers: Mapping[str, Any]) -> dict[str, Step]:
    """The steps of a recipe file, with some of its numbers exchanged. Raises UserError that names what is wrong."""
    try:
        said = OmegaConf.load(file)
        content: Any = OmegaConf.to_container(said)
        if not isinstance(content, dict) or not isinstance(content.get("steps"), dict):
            raise UserError(f"file={file}: has no `steps:`, each with a method, its inputs and numbers")
        if odd := [key for key in content if key not in ("steps", "numbers")]:
            raise UserError(f"file={file}: unknown key '{odd[0]}'; a recipe has steps and numbers")
        own = content.get("numbers") or {}
        for key, number in numbers.items():
            if key not in own:
                raise UserError(f"numbers.{key}: {file.name} has no such number{did_you_mean(key, own)}")
            OmegaConf.update(said, f"numbers.{key}", number)
        resolved: Any = OmegaConf.to_container(said, resolve=True)
    except OSError as error:
        raise UserError(f"file={file}: cannot be read ({error.strerror}); pass a recipe, file=RECIPE.yaml") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"file={file}: {' '.join(str(error).split())}") from error
    return {str(name): read_step(str(name), dict(step or {})) for name, step in resolved["steps"].items()}


def refuse_bad_inputs(prefix: str, inputs: Mapping[str, Any]) -> None:
    """Raise UserError for an input that is no name."""
    for key, given in inputs.items():
        if not all(isinstance(one, str) for one in (given if isinstance(given, list) else [given])):
            raise UserError(f"{prefix}{key}={given}: must be nano, a folder, a file or a step, or a list of them")


def read_step(name: str, said: dict[str, Any]) -> Step:
    """One step of a recipe file."""
    method = said.pop("method", None)
    if method not in METHODS:
        guess = did_you_mean(method, METHODS) or f"; methods are {', '.join(METHODS)}"
        raise UserError(f"{name}.method={method}: there is no such method{guess}")
    wanted, signature = METHODS[method], signature_of(METHODS[method])
    known = [*signature.inputs, *signature.numbers]
    if odd := [key for key in said if key not in known]:
        guess = did_you_mean(odd[0], known) or f"; it takes {', '.join(known)}"
        raise UserError(f"{name}.{odd[0]}: {method} has no such argument{guess}")
    inputs = {key: said.pop(key) for key in signature.inputs if key in said}
    refuse_bad_inputs(f"{name}.", inputs)
    node = {"_target_": f"{wanted.__module__}.{method}", "_partial_": True, **said}
    checked = OmegaConf.create({name: node})
    check(checked)
    numbers = OmegaConf.to_container(checked[name])
    assert isinstance(numbers, dict)
    return Step(wanted, inputs, {str(key): number for key, number in numbers.items() if key in said})


def subjects_of(steps: Mapping[str, Step], out: str) -> dict[str, str]:
    """Names for the inputs and the result, to look at them side by side."""
    paths = dict.fromkeys(one for step in steps.values() for _, one in step.input_items() if one not in steps)
    return dict(zip("abcdefghijklmnopqrstuvwxyz", paths, strict=False)) | {"merged": out}


def in_words(item: tuple[str, Step]) -> str:
    """`merged = weighted_sum(a=nano, b=x, alpha=0.5)`."""
    name, step = item
    arguments = ", ".join(f"{key}={given}" for key, given in {**step.inputs, **step.numbers}.items())
    return f"{name} = {step.method.__name__}({arguments})"


def quote_value(path: str) -> str:
    """A path as a value on Hydra's command line, quoted where it must be."""
    return path if re.fullmatch(r"[A-Za-z0-9_./+-]+", path) else json.dumps(path, ensure_ascii=False)
