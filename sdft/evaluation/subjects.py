"""Who is compared: models of their own, or the base model with a LoRA and new words on it.

Knows the files that training, merging and other programs leave, and how to put adapters on a model and take them off
again without a trace. Must not know how pictures are scored or shown.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import MinLen

from sdft.formats.adapter import lora_on, read_words
from sdft.formats.lora_file import is_lora, read_lora, read_names
from sdft.models.sdxl import SDXL
from sdft.sampling import Sampler
from sdft.types import Count, UserError

SUMMARY = "summary.json"
HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
FILES = (".safetensors", ".ckpt", ".pt", ".bin")
EXAMPLE = "subjects='{base: nano, mine: RUN_FOLDER}'"


@dataclass(frozen=True)
class Question:
    """What every subject is asked to draw."""

    prompt: str
    seed: int


class Comparison:
    """Every subject draws every prompt from the same seeds.

    subjects: name -> `nano`, a hub id, a diffusers folder, a single-file checkpoint, a run folder of `train.py`, or a
        LoRA file. Names become folders.
    model: loads the base model; called with `weights`, another one.
    prompts: what is drawn.
    sampler: how it is drawn.
    seeds: pictures of each prompt; they start from the seeds 0, 1, ...
    size: side of the pictures, in pixels.
    judge: folder or hub id of a CLIP that scores the pictures; `nano` is the shipped one; none scores nothing.
    run_dir: where everything is written.
    """

    def __init__(
        self,
        subjects: Mapping[str, str],
        model: Callable[..., SDXL],
        prompts: Annotated[Sequence[str], MinLen(1)],
        sampler: Sampler,
        run_dir: str,
        seeds: Count = 1,
        size: Count = 64,
        judge: str | None = None,
    ):
        self.subjects, self.model, self.sampler, self.judge = dict(subjects), model, sampler, judge
        self.prompts, self.seeds, self.size, self.run_dir = list(prompts), seeds, size, Path(run_dir)

    @property
    def questions(self) -> list[Question]:
        """Each prompt with each seed."""
        return [Question(prompt, seed) for prompt in self.prompts for seed in range(self.seeds)]


@dataclass(frozen=True)
class Subject:
    """One of those compared; `source` is what the user wrote."""

    name: str
    source: str
    weights: str | None = None
    """Of a model of its own; none for the base model."""
    lora: Path | None = None
    words: Path | None = None

    @property
    def key(self) -> str:
        """As errors name it."""
        return f"subjects.{self.name}={self.source}"

    @property
    def kind(self) -> str:
        """In words, for the report."""
        if self.weights is not None:
            return "model"
        return " and ".join(what for what, path in (("LoRA", self.lora), ("new words", self.words)) if path)


def read_subjects(sources: Mapping[str, str]) -> list[Subject]:
    """What each source is, found without loading weights. Raises UserError that names the subject."""
    if not sources:
        raise UserError(f"subjects is empty: say what to compare, as in {EXAMPLE}")
    for name in sources:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UserError(f"subjects.{name}: names become folders; use letters, digits, dots, dashes and underscores")
    return [_subject(name, source) for name, source in sources.items()]


def _subject(name: str, source: str) -> Subject:
    path, key = Path(source).expanduser(), f"subjects.{name}={source}"
    if source == "nano":
        return Subject(name, source, weights=source)
    if path.is_dir():
        if (path / SUMMARY).is_file():
            return _run(name, source, path)
        if (path / "model_index.json").is_file():
            return Subject(name, source, weights=source)
        raise UserError(f"{key}: is neither a finished run (no {SUMMARY}) nor a diffusers model (no model_index.json)")
    if path.is_file():
        return _file(name, source, path)
    # `runs/typo` looks like a hub id too; that `runs` lies here tells them apart.
    if re.fullmatch(HUB_ID, source) and not path.parent.is_dir() and path.suffix not in FILES:
        return Subject(name, source, weights=source)
    raise UserError(f"{key}: there is no such file or folder, and it is no hub id (owner/name)")


def _run(name: str, source: str, folder: Path) -> Subject:
    """A run folder; its artifacts are looked for beside its summary, so that it may have been moved."""
    key, what = f"subjects.{name}={source}", json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    paths = {kind: folder / Path(path).name for kind, path in what.get("artifacts", {}).items()}
    for kind in ("lora", "lora_kohya", "words", "model"):
        if kind in paths and not paths[kind].exists():
            raise UserError(f"{key}: the run's {kind}, {paths[kind]}, is missing")
    if lora := paths.get("lora", paths.get("lora_kohya")):
        return Subject(name, source, lora=lora, words=paths.get("words"))
    if "model" in paths and (paths["model"] / "model_index.json").is_file():
        return Subject(name, source, weights=str(paths["model"]))
    raise UserError(f"{key}: the run left neither a LoRA nor a whole SDXL model")


def _file(name: str, source: str, path: Path) -> Subject:
    key = f"subjects.{name}={source}"
    if path.suffix != ".safetensors":
        raise UserError(f"{key}: is no .safetensors file; of a run, pass its folder")
    names, _ = read_names(key, path)
    if is_lora(names):
        return Subject(name, source, lora=path)
    if any(tensor.startswith("model.diffusion_model.") for tensor in names):
        return Subject(name, source, weights=source)
    raise UserError(f"{key}: is neither an SDXL checkpoint nor a LoRA")


class Models:
    """Opens subjects. The base model is loaded once, when it is first needed, and leaves every subject as it came.

    load: the base model without arguments, another with `weights`.
    base_weights: of the base model; none where it has no weights of its own.
    """

    def __init__(self, load: Callable[..., SDXL], base_weights: str | None, device: torch.device):
        self._load, self.base_weights, self._device = load, base_weights, device

    @cached_property
    def base(self) -> SDXL:
        """The model that LoRAs go on."""
        return self._load().to(self._device).eval()

    @contextmanager
    def open(self, subject: Subject) -> Iterator[SDXL]:
        """The subject's model, inside the `with`."""
        if subject.weights not in (None, self.base_weights):
            yield self._own(subject)
            return
        with ExitStack() as stack:
            if subject.lora is not None:
                stack.enter_context(with_lora(self.base, subject.lora, subject.key))
            if subject.words is not None:
                stack.enter_context(with_words(self.base, subject.words, subject.key))
            yield self.base

    def _own(self, subject: Subject) -> SDXL:
        if self.base_weights is None:
            raise UserError(f"{subject.key}: choose a model that takes weights, such as model=nano or model=sdxl")
        try:
            return self._load(weights=subject.weights).to(self._device).eval()
        except UserError as error:
            raise UserError(str(error).replace("model.weights", f"subjects.{subject.name}")) from error


@contextmanager
def with_lora(model: SDXL, path: Path, key: str = "lora") -> Iterator[None]:
    """The model with a LoRA at full strength inside the `with`; afterwards it has its own modules and bits again."""
    with lora_on(model, read_lora(path, key), key):
        yield


@contextmanager
def with_words(model: SDXL, path: Path, key: str = "words") -> Iterator[None]:
    """The model with learned words inside the `with`; afterwards it has its own tokenizers and tables again."""
    words, rows = read_words(path, key)
    tokenizers = model.tokenizer, model.tokenizer_2
    tables = [encoder.get_input_embeddings() for _, encoder in model.context_encoders]
    model.tokenizer, model.tokenizer_2 = (copy.deepcopy(tokenizer) for tokenizer in tokenizers)
    try:
        try:
            model.add_words({word: word for word in words})
        except UserError as error:
            raise UserError(f"{key}: the base model knows one of the words {words} already") from error
        for name, row_ND in model.word_rows.items():
            if row_ND.shape != rows[name].shape:
                shapes = f"{list(rows[name].shape)} in the file, {list(row_ND.shape)} in the base model"
                raise UserError(f"{key}: {name} of {path.name} does not fit: {shapes}")
            row_ND.data.copy_(rows[name])
        yield
    finally:
        model.tokenizer, model.tokenizer_2 = tokenizers
        for (_, encoder), table in zip(model.context_encoders, tables, strict=True):
            encoder.set_input_embeddings(table)
