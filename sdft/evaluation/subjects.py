"""The subjects of a comparison: whole models, or the base model with LoRAs and new words applied.

Recognises the files of training runs, merges and other programs without loading weights; `subject_loader` loads them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdft.errors import UserError
from sdft.evaluation.results import Value
from sdft.formats.lora_file import is_lora, read_names
from sdft.formats.power_average import KeptAverages
from sdft.formats.run_folder import SUMMARY, RunOutputs, read_run_outputs

HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
FILES = (".safetensors", ".ckpt", ".pt", ".bin")
EXAMPLE = "subjects='{base: nano, mine: RUN_FOLDER}'"
FINAL = -1
"""Stands for the last step of a training run."""

Part = str | Mapping[str, str | float]
Source = Part | Sequence[Part]
"""`nano`, a hub id, a folder, a file; `{lora: RUN_OR_FILE, scale: 0.7}`; or a list: a model and LoRAs on it."""


@dataclass(frozen=True)
class AdapterFiles:
    """Files that are applied to a model: a LoRA at a strength, and learned words."""

    lora: Path | None = None
    words: Path | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Subject:
    """A subject of the comparison. `source` is what the user wrote."""

    name: str
    source: str
    weights: str | None = None
    """Path or hub id of a whole model; None for the base model."""
    adapters: tuple[AdapterFiles, ...] = ()
    """Applied together, in this order."""
    run: Path | None = None
    """The run folder of `train.py`, if the subject is a training run."""
    num_steps: int | None = None
    """Steps of the run."""
    cost: Mapping[str, float] = field(default_factory=dict)
    """Seconds of training, trained parameters and bytes, if known."""
    varied: Mapping[str, Value] = field(default_factory=dict)
    """In a sweep, the values that distinguish its job."""

    @property
    def key(self) -> str:
        """The config key and source, as error messages name the subject."""
        return f"subjects.{self.name}={self.source}"

    @property
    def loras(self) -> list[AdapterFiles]:
        """Those of `adapters` that have a LoRA, and so a strength."""
        return [files for files in self.adapters if files.lora is not None]

    @property
    def kind(self) -> str:
        """For readers, such as `model and 2 LoRAs`."""
        kinds = ["model"] if self.weights is not None else []
        kinds += ["LoRA" if len(self.loras) == 1 else f"{len(self.loras)} LoRAs"] if self.loras else []
        kinds += ["new words"] if any(files.words for files in self.adapters) else []
        return " and ".join(kinds)

    @property
    def checkpoints(self) -> dict[int, Path]:
        """The checkpoints that the run kept, by step."""
        found = self.run.glob("checkpoints/step_*.ckpt") if self.run else ()
        return {int(path.stem.removeprefix("step_")): path for path in sorted(found)}

    @property
    def has_averages(self) -> bool:
        """Whether the run kept averages of which any width can be rebuilt."""
        return self.run is not None and bool(KeptAverages(self.run).steps)

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps at which the run can be sampled: its checkpoints and its end; empty if it kept no checkpoints."""
        checkpoints = self.checkpoints
        return tuple(sorted({*checkpoints, self.num_steps})) if checkpoints and self.num_steps else ()


def read_subjects(sources: Mapping[str, Source]) -> list[Subject]:
    """The subject of each source, without loading weights. Raises UserError that names the subject."""
    if not sources:
        raise UserError(f"subjects is empty: say what to compare, as in {EXAMPLE}")
    for name in sources:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"subjects.{name}: use letters, digits, dots, dashes and underscores in names")
    return [_subject(name, source) for name, source in sources.items()]


def _subject(name: str, source: Source) -> Subject:
    """One subject from the parts of its source."""
    parts = [source] if isinstance(source, str | Mapping) else list(source)
    if not parts:
        raise UserError(f"subjects.{name} is an empty list: give a model, LoRAs, or both")
    found = [_part(name, part) for part in parts]
    text = " + ".join(subject.source for subject in found)
    models = [subject for subject in found if subject.weights is not None]
    if len(models) > 1:
        raise UserError(f"subjects.{name}={text}: has {len(models)} models; blend them with python -m sdft.merging")
    if len(found) == 1:
        return found[0]
    adapters = tuple(files for subject in found for files in subject.adapters)
    return Subject(name, text, models[0].weights if models else None, adapters)


def _part(name: str, source: Part) -> Subject:
    if isinstance(source, str):
        return _from_path(name, source)
    if unknown := set(source) - {"lora", "scale"}:
        raise UserError(f"subjects.{name}.{sorted(unknown)[0]}: a part is {{lora: RUN_OR_FILE, scale: 0.7}} or a path")
    lora, scale = source.get("lora"), source.get("scale", 1.0)
    if not isinstance(lora, str) or not isinstance(scale, int | float):
        raise UserError(f"subjects.{name}: a part needs the path of a LoRA and a number: {{lora: FILE, scale: 0.7}}")
    found = _from_path(name, lora)
    if not found.loras:
        raise UserError(f"subjects.{name}.lora={lora}: is {found.kind or 'no LoRA'}, not a LoRA, and has no scale")
    adapters = tuple(AdapterFiles(files.lora, files.words, float(scale)) for files in found.adapters)
    return Subject(name, f"{lora} x {scale:g}", None, adapters, cost=found.cost)


def _from_path(name: str, source: str) -> Subject:
    path, key = Path(source).expanduser(), f"subjects.{name}={source}"
    if source == "nano":
        return Subject(name, source, weights=source)
    if path.is_dir():
        try:
            left = read_run_outputs(path)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
        if left is not None:
            return _from_run(name, source, path, left)
        if (path / "model_index.json").is_file():
            return Subject(name, source, weights=source)
        raise UserError(f"{key}: is neither a finished run (no {SUMMARY}) nor a diffusers model (no model_index.json)")
    if path.is_file():
        return _from_file(name, source, path)
    # `runs/typo` has the form of a hub id too, but the folder `runs` exists.
    if re.fullmatch(HUB_ID, source) and not path.parent.is_dir() and path.suffix not in FILES:
        return Subject(name, source, weights=source)
    raise UserError(f"{key}: there is no such file or folder, and it is no hub id (owner/name)")


def _from_run(name: str, source: str, folder: Path, left: RunOutputs) -> Subject:
    """A run folder."""
    key, summary, paths = f"subjects.{name}={source}", left.summary, left.artifacts
    for kind in ("lora", "lora_kohya", "words", "model"):
        if kind in paths and not paths[kind].exists():
            raise UserError(f"{key}: the run's {kind}, {paths[kind]}, is missing")
    known = {"seconds": summary.get("train_seconds"), "parameters": summary.get("num_trained_parameters")}
    cost = {name: float(value) for name, value in known.items() if value is not None}
    if left.weights is not None:
        files = [left.weights] if left.weights.is_file() else [f for f in left.weights.rglob("*") if f.is_file()]
        cost["bytes"] = float(sum(file.stat().st_size for file in files))
    steps = summary.get("num_steps")
    if left.lora is not None:
        adapters = (AdapterFiles(left.lora, paths.get("words")),)
        return Subject(name, source, None, adapters, folder, steps, cost)
    if "model" in paths and (paths["model"] / "model_index.json").is_file():
        return Subject(name, source, str(paths["model"]), (), folder, steps, cost)
    raise UserError(f"{key}: the run left neither a LoRA nor a whole SDXL model")


def _from_file(name: str, source: str, path: Path) -> Subject:
    key = f"subjects.{name}={source}"
    if path.suffix != ".safetensors":
        raise UserError(f"{key}: is no .safetensors file; of a run, pass its folder")
    names, _ = read_names(key, path)
    if is_lora(names):
        return Subject(name, source, adapters=(AdapterFiles(path),), cost={"bytes": float(path.stat().st_size)})
    if any(tensor.startswith("model.diffusion_model.") for tensor in names):
        return Subject(name, source, weights=source, cost={"bytes": float(path.stat().st_size)})
    raise UserError(f"{key}: is neither an SDXL checkpoint nor a LoRA")
