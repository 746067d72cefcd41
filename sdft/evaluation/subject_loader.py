"""Opens subjects as models: puts adapters on and takes them off again without a trace.

Knows how models, LoRAs, words and checkpoints are opened, and what identifies their content. Must not know prompts.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from sdft.errors import UserError
from sdft.evaluation.subjects import FINAL, Subject
from sdft.formats.adapter import applied_lora, read_words
from sdft.formats.lora_file import read_lora
from sdft.formats.lora_layer import LoraFile
from sdft.formats.lora_stack import stack_loras
from sdft.formats.training_checkpoint import read_state
from sdft.models.load import find_checkpoint
from sdft.models.sdxl import SDXL
from sdft.tuning.parameters import copy_parameters, trainable_parameters


class SubjectLoader:
    """Opens subjects. The base model is loaded once, when it is first needed, and leaves every subject as it came.

    load: the base model without arguments, another with `weights`.
    base_weights: of the base model; none where it has no weights of its own.
    revive: the model of a run as it was at its first step, given the run's folder, so that checkpoints can be put in.
    """

    def __init__(
        self,
        load: Callable[..., SDXL],
        base_weights: str | None,
        device: torch.device,
        rebuild: Callable[[Path], SDXL] | None = None,
    ):
        self._load, self.base_weights, self.device, self._rebuild = load, base_weights, device, rebuild
        self._own: tuple[object, SDXL] | None = None
        """The last model that is not the base: one at a time."""

    @cached_property
    def base(self) -> SDXL:
        """The model that LoRAs go on."""
        return self._load().to(self.device).eval()

    @contextmanager
    def open(self, subject: Subject, scale: float = 1.0, step: int = FINAL) -> Iterator[SDXL]:
        """The subject's model, inside the `with`.

        scale: of its LoRAs, times their own strengths. step: of its training.
        """
        if step != FINAL:
            yield self._at_step(subject, step)
            return
        with ExitStack() as stack:
            model = self.base if subject.weights in (None, self.base_weights) else self._of_its_own(subject)
            paths = [(worn.lora, worn.scale * scale) for worn in subject.worn if worn.lora is not None]
            loras = [(read_lora(path, subject.key), strength) for path, strength in paths]
            if any(strength for _, strength in loras):
                stack.enter_context(trained_prediction_type(model, [lora for lora, _ in loras], subject.key))
                stack.enter_context(applied_lora(model, stack_loras(loras, subject.key), subject.key))
            for worn in subject.worn:
                if worn.words is not None:
                    stack.enter_context(with_words(model, worn.words, subject.key))
            yield model

    def identity(self, subject: Subject, scale: float, step: int) -> list[Any]:
        """What the weights are, by content: equal where the pictures must be equal."""
        if step != FINAL:
            return [file_digest(subject.checkpoints[step]), self._model_identity(self.base_weights)]
        weights = subject.weights if subject.weights is not None else self.base_weights
        worn = [
            [what, file_digest(path), strength]
            for worn in subject.worn
            for what, path, strength in (("lora", worn.lora, worn.scale * scale), ("words", worn.words, 1.0))
            if path is not None and strength
        ]
        return [self._model_identity(weights), *worn]

    def _model_identity(self, weights: str | None) -> Any:
        options = dict(self._load.keywords) if isinstance(self._load, partial) else {}
        digest = None
        if weights is not None:
            digest = model_digest(weights, options.get("variant"), options.get("allow_pickle", False))
        return [digest, _plain(options)]

    def _of_its_own(self, subject: Subject) -> SDXL:
        if self.base_weights is None:
            raise UserError(f"{subject.key}: choose a model that takes weights, such as model=nano or model=sdxl")
        if self._own is None or self._own[0] != subject.weights:
            self._own = None  # its memory first
            try:
                self._own = subject.weights, self._load(weights=subject.weights).to(self.device).eval()
            except UserError as error:
                raise UserError(str(error).replace("model.weights", f"subjects.{subject.name}")) from error
        return self._own[1]

    def _at_step(self, subject: Subject, step: int) -> SDXL:
        """The run's model with what it had learned by then; the average where the run kept one."""
        if self._rebuild is None or subject.run is None:
            raise UserError(f"{subject.key}: is no run, so it has no step {step}")
        if self._own is None or self._own[0] != subject.run:
            self._own = None
            self._own = subject.run, self._rebuild(subject.run).to(self.device).eval()
        model, path = self._own[1], subject.checkpoints[step]
        state = read_state(path)
        averages = [kept["average"] for kept in state["callbacks"].values() if "average" in kept]
        live = state["state_dict"] if not averages else {}
        weights = averages[0] if averages else {name.removeprefix("model."): value for name, value in live.items()}
        if {name for name, _ in trainable_parameters(model)} != set(weights):
            raise UserError(f"{subject.key}: {path.name} holds other weights than the run's config trains")
        copy_parameters(model, weights)
        return model


@contextmanager
def with_lora(model: SDXL, path: Path, key: str = "lora") -> Iterator[None]:
    """The model with a LoRA at full strength inside the `with`; afterwards it has its own modules and bits again."""
    with applied_lora(model, read_lora(path, key), key):
        yield


@contextmanager
def trained_prediction_type(model: SDXL, loras: Sequence[LoraFile], key: str) -> Iterator[None]:
    """The model's noise schedule as the LoRAs were trained for, inside the `with`."""
    told = {prediction_of(lora) for lora in loras} - {None}
    if len(told) > 1:
        raise UserError(f"{key}: one of the LoRAs predicts noise and one v; they do not go together")
    kept = model.scheduler
    if told:
        prediction, zero_snr = told.pop()  # type: ignore[misc]
        model.set_prediction_type(prediction, zero_snr or kept.config.rescale_betas_zero_snr)
    try:
        yield
    finally:
        model.scheduler = kept


def prediction_of(lora: LoraFile) -> tuple[str, bool] | None:
    """(v_prediction, whether the schedule ends in noise) of a LoRA that says it learned v; others go with any base."""
    said = lora.metadata
    learned_v = said.get("modelspec.prediction_type") == "v" or said.get("ss_v_parameterization") == "True"
    return ("v_prediction", said.get("ss_zero_terminal_snr") == "True") if learned_v else None


@lru_cache
def file_digest(path: Path) -> str:
    """Of a file's content."""
    try:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


@lru_cache
def model_digest(weights: str, variant: str | None = None, allow_pickle: bool = False) -> str:
    """Of a model's weights, and of the configs and tokenizers beside them."""
    checkpoint = find_checkpoint(weights, variant, allow_pickle)
    files = set(checkpoint.files) or {checkpoint.root}
    if checkpoint.is_folder:
        files |= {file for kind in ("*.json", "*.txt") for file in checkpoint.root.rglob(kind)}
    names = {file: file.name if file == checkpoint.root else str(file.relative_to(checkpoint.folder)) for file in files}
    told = [[names[file], file_digest(file)] for file in sorted(files, key=names.__getitem__)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """The options of loading that pictures depend on, as JSON holds them."""
    return {name: str(value) for name, value in sorted(options.items()) if name not in ("weights", "allow_pickle")}


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
