"""Who is compared: models of their own, or the base model with LoRAs and new words on it.

Knows the files that training, merging and other programs leave. Must not know how models are opened, nor how pictures
are scored or shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sdft.errors import UserError
from sdft.evaluation.results import Value
from sdft.formats.lora_file import is_lora, read_names
from sdft.formats.run_folder import SUMMARY, RunOutputs, read_run_outputs

HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
FILES = (".safetensors", ".ckpt", ".pt", ".bin")
EXAMPLE = "subjects='{base: nano, mine: RUN_FOLDER}'"
FINAL = -1
"""The step of training at which a run ended."""

Part = str | Mapping[str, str | float]
Source = Part | Sequence[Part]
"""`nano`, a hub id, a folder, a file; `{lora: RUN_OR_FILE, scale: 0.7}`; or a list: a model and LoRAs on it."""


@dataclass(frozen=True)
class AdapterFiles:
    """A LoRA, and new words, on a model."""

    lora: Path | None = None
    words: Path | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Subject:
    """One of those compared; `source` is what the user wrote."""

    name: str
    source: str
    weights: str | None = None
    """Of a model of its own; none for the base model."""
    worn: tuple[AdapterFiles, ...] = ()
    run: Path | None = None
    """The folder of `train.py`."""
    num_steps: int | None = None
    """Of the run."""
    cost: Mapping[str, float] = field(default_factory=dict)
    varied: Mapping[str, Value] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """As errors name it."""
        return f"subjects.{self.name}={self.source}"

    @property
    def loras(self) -> list[AdapterFiles]:
        """What has a strength."""
        return [worn for worn in self.worn if worn.lora is not None]

    @property
    def kind(self) -> str:
        """In words, for the report."""
        whats = ["model"] if self.weights is not None else []
        whats += ["LoRA" if len(self.loras) == 1 else f"{len(self.loras)} LoRAs"] if self.loras else []
        whats += ["new words"] if any(worn.words for worn in self.worn) else []
        return " and ".join(whats)

    @property
    def checkpoints(self) -> dict[int, Path]:
        """Those that the run kept on its way, by step."""
        found = self.run.glob("checkpoints/step_*.ckpt") if self.run else ()
        return {int(path.stem.removeprefix("step_")): path for path in sorted(found)}

    @property
    def steps(self) -> tuple[int, ...]:
        """Where the run can be looked at: its checkpoints and its end; none where it kept no checkpoints."""
        kept = self.checkpoints
        return tuple(sorted({*kept, self.num_steps})) if kept and self.num_steps else ()


def read_subjects(sources: Mapping[str, Source]) -> list[Subject]:
    """What each source is, found without loading weights. Raises UserError that names the subject."""
    if not sources:
        raise UserError(f"subjects is empty: say what to compare, as in {EXAMPLE}")
    for name in sources:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"subjects.{name}: use letters, digits, dots, dashes and underscores in names")
    return [_subject(name, source) for name, source in sources.items()]


def _subject(name: str, source: Source) -> Subject:
    """One subject of all its parts."""
    parts = [source] if isinstance(source, str | Mapping) else list(source)
    if not parts:
        raise UserError(f"subjects.{name} is an empty list: give a model, LoRAs, or both")
    found = [_part(name, part) for part in parts]
    told = " + ".join(subject.source for subject in found)
    models = [subject for subject in found if subject.weights is not None]
    if len(models) > 1:
        raise UserError(f"subjects.{name}={told}: has {len(models)} models; blend them with python -m sdft.merging")
    if len(found) == 1:
        return found[0]
    worn = tuple(worn for subject in found for worn in subject.worn)
    return Subject(name, told, models[0].weights if models else None, worn)


def _part(name: str, source: Part) -> Subject:
    if isinstance(source, str):
        return _place(name, source)
    if unknown := set(source) - {"lora", "scale"}:
        raise UserError(f"subjects.{name}.{sorted(unknown)[0]}: a part is {{lora: RUN_OR_FILE, scale: 0.7}} or a path")
    lora, scale = source.get("lora"), source.get("scale", 1.0)
    if not isinstance(lora, str) or not isinstance(scale, int | float):
        raise UserError(f"subjects.{name}: a part needs the path of a LoRA and a number: {{lora: FILE, scale: 0.7}}")
    found = _place(name, lora)
    if not found.loras:
        raise UserError(f"subjects.{name}.lora={lora}: is {found.kind or 'no LoRA'}, not a LoRA, and has no scale")
    worn = tuple(AdapterFiles(worn.lora, worn.words, float(scale)) for worn in found.worn)
    return Subject(name, f"{lora} x {scale:g}", None, worn, cost=found.cost)


def _place(name: str, source: str) -> Subject:
    path, key = Path(source).expanduser(), f"subjects.{name}={source}"
    if source == "nano":
        return Subject(name, source, weights=source)
    if path.is_dir():
        if (left := read_run_outputs(path)) is not None:
            return _run(name, source, path, left)
        if (path / "model_index.json").is_file():
            return Subject(name, source, weights=source)
        raise UserError(f"{key}: is neither a finished run (no {SUMMARY}) nor a diffusers model (no model_index.json)")
    if path.is_file():
        return _file(name, source, path)
    # `runs/typo` looks like a hub id too; that `runs` lies here tells them apart.
    if re.fullmatch(HUB_ID, source) and not path.parent.is_dir() and path.suffix not in FILES:
        return Subject(name, source, weights=source)
    raise UserError(f"{key}: there is no such file or folder, and it is no hub id (owner/name)")


def _run(name: str, source: str, folder: Path, left: RunOutputs) -> Subject:
    """A run folder."""
    key, what, paths = f"subjects.{name}={source}", left.summary, left.artifacts
    for kind in ("lora", "lora_kohya", "words", "model"):
        if kind in paths and not paths[kind].exists():
            raise UserError(f"{key}: the run's {kind}, {paths[kind]}, is missing")
    told = {"seconds": what.get("train_seconds"), "parameters": what.get("num_trained_parameters")}
    cost = {name: float(value) for name, value in told.items() if value is not None}
    if left.weights is not None:
        files = [left.weights] if left.weights.is_file() else [f for f in left.weights.rglob("*") if f.is_file()]
        cost["bytes"] = float(sum(file.stat().st_size for file in files))
    run, steps = folder, what.get("num_steps")
    if left.lora is not None:
        worn = (AdapterFiles(left.lora, paths.get("words")),)
        return Subject(name, source, None, worn, run, steps, cost)
    if "model" in paths and (paths["model"] / "model_index.json").is_file():
        return Subject(name, source, str(paths["model"]), (), run, steps, cost)
    raise UserError(f"{key}: the run left neither a LoRA nor a whole SDXL model")


def _file(name: str, source: str, path: Path) -> Subject:
    key = f"subjects.{name}={source}"
    if path.suffix != ".safetensors":
        raise UserError(f"{key}: is no .safetensors file; of a run, pass its folder")
    names, _ = read_names(key, path)
    if is_lora(names):
        return Subject(name, source, worn=(AdapterFiles(path),), cost={"bytes": float(path.stat().st_size)})
    if any(tensor.startswith("model.diffusion_model.") for tensor in names):
        return Subject(name, source, weights=source, cost={"bytes": float(path.stat().st_size)})
    raise UserError(f"{key}: is neither an SDXL checkpoint nor a LoRA")
