"""Loads subjects as models, applies adapters and removes them again without changing a bit of the base model.

Also gives the identity of a subject's weights by content, from which the image cache makes its names.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdft.errors import UserError
from sdft.evaluation.subjects import FINAL, Subject
from sdft.formats.adapter import applied_lora, read_words
from sdft.formats.baked import open_loras, refuse_other_base
from sdft.formats.lora_file import read_lora
from sdft.formats.lora_layer import LoraFile
from sdft.formats.lora_stack import stack_loras
from sdft.formats.metadata import says_zero_terminal_snr, stated_prediction
from sdft.formats.model_checkpoint import refuse_incomplete
from sdft.formats.power_average import KeptAverages
from sdft.formats.safetensors_io import refuse_nonfinite
from sdft.formats.training_checkpoint import read_state, refuse_foreign
from sdft.models.load import find_checkpoint
from sdft.protocols import DiffusionModel, Tuning
from sdft.tuning.parameters import copy_parameters, trainable_parameters

SMALL = 2**30
"""Bytes of a base model that stays in memory beside another model."""


class SubjectLoader:
    """Loads subjects. The base model is loaded on first use; adapters of one subject never reach the next.

    One model is in memory at a time, besides a small base model: a large one is loaded again when it is next needed.

    load: loads the base model; called with `weights`, another one.
    base_weights: path or name of the base model; None if it is not loaded from weights.
    rebuild: given a run folder, builds the run's model as it was at its first step, to load checkpoints into, and the
        tuning that is attached to it.
    """

    def __init__(
        self,
        load: Callable[..., DiffusionModel],
        base_weights: str | None,
        device: torch.device,
        rebuild: Callable[[Path], tuple[DiffusionModel, Tuning]] | None = None,
    ):
        self._load, self.base_weights, self.device, self._rebuild = load, base_weights, device, rebuild
        self._base: DiffusionModel | None = None
        self._other: tuple[object, DiffusionModel] | None = None
        """Key and model of the last one that is not the base model; only one is in memory."""
        self._tuning: Tuning | None = None
        """Of that model, if it is a run's."""

    @property
    def base(self) -> DiffusionModel:
        """The model to which LoRAs are applied."""
        if self._base is None:
            self._other = None
            self._base = self._load().to(self.device).eval()
        return self._base

    @property
    def _bakes(self) -> bool:
        """Whether the base model, and no other, has LoRAs baked into its weights."""
        return isinstance(self._load, partial) and bool(self._load.keywords.get("loras"))

    def _make_room(self) -> None:
        """Free what another model takes the place of."""
        self._other = None
        if self._base is not None and sum(p.nbytes for p in self._base.parameters()) > SMALL:
            self._base = None

    def check(self, subject: Subject) -> None:
        """Read the files of a subject once. Raises UserError for one that is damaged, or has NaN in its weights.

        A comparison checks all subjects before it generates the first image, which may take hours.
        """
        for files in subject.adapters:
            if files.lora is not None:
                read_lora(files.lora, subject.key)
            if files.words is not None:
                read_words(files.words, subject.key)
        if subject.weights not in (None, self.base_weights):
            options = self._load.keywords if isinstance(self._load, partial) else {}
            chosen = options.get("variant"), options.get("allow_pickle", False)
            try:
                checkpoint = find_checkpoint(str(subject.weights), *chosen)
                if options.get("vae") is None:
                    refuse_incomplete(subject.key, checkpoint)
                with checkpoint.opened() as read:
                    for weight in checkpoint.weights:
                        refuse_nonfinite(subject.key, weight, read(weight))
            except UserError as error:
                raise UserError(str(error).replace("model.weights", f"subjects.{subject.name}")) from error

    @contextmanager
    def open(
        self, subject: Subject, scale: float = 1.0, step: int = FINAL, width: float | None = None
    ) -> Iterator[DiffusionModel]:
        """Context manager that gives the subject's model.

        scale: multiplies the strengths of its LoRAs. step: of its training, to load a checkpoint. width: of the average
        of the run's weights, to rebuild it from the copies that the run kept.

        Raises UserError for a scale of a checkpoint or average whose strength is fixed.
        """
        if width is not None or step != FINAL:
            model = self._averaged(subject, width) if width is not None else self._at_step(subject, step)
            assert self._tuning is not None  # a run's
            if scale not in (0, 1):
                self._tuning.refuse_strength("axes.scale")
            with self._tuning.drawing_at(model, scale):
                yield model
            return
        with ExitStack() as stack:
            model = self.base if subject.weights in (None, self.base_weights) else self._other_model(subject)
            paths = [(files.lora, files.scale * scale) for files in subject.adapters if files.lora is not None]
            loras = [(read_lora(path, subject.key), strength) for path, strength in paths]
            if any(strength for _, strength in loras):
                for lora, _ in loras:
                    refuse_other_base(subject.key, lora.metadata, model)
                stack.enter_context(trained_prediction_type(model, [lora for lora, _ in loras], subject.key))
                stack.enter_context(applied_lora(model, stack_loras(loras, subject.key), subject.key))
            for files in subject.adapters:
                if files.words is not None:
                    stack.enter_context(with_words(model, files.words, subject.key))
            yield model

    def identity(self, subject: Subject, scale: float, step: int, width: float | None = None) -> list[Any]:
        """The weights by content, as JSON types: equal identities give equal images."""
        scaled = [] if scale == 1 else [scale]
        if width is not None:
            files = KeptAverages(subject.run or Path()).steps.values()
            return [[file_digest(file) for file in files], width, self._model_identity(self.base_weights), *scaled]
        if step != FINAL:
            return [file_digest(subject.checkpoints[step]), self._model_identity(self.base_weights), *scaled]
        weights = subject.weights if subject.weights is not None else self.base_weights
        adapters = [
            [kind, file_digest(path), strength]
            for files in subject.adapters
            for kind, path, strength in (("lora", files.lora, files.scale * scale), ("words", files.words, 1.0))
            if path is not None and strength
        ]
        return [self._model_identity(weights), *adapters]

    def _model_identity(self, weights: str | None) -> Any:
        options = dict(self._load.keywords) if isinstance(self._load, partial) else {}
        digest = None
        if weights is not None:
            digest = model_digest(weights, options.get("variant"), options.get("allow_pickle", False))
        if baked := options.pop("loras", ()) if weights == self.base_weights else ():
            options["loras"] = [one.described() for one in open_loras(baked)]
        return [digest, _plain(options)]

    def _other_model(self, subject: Subject) -> DiffusionModel:
        if self.base_weights is None:
            raise UserError(f"{subject.key}: choose a model that takes weights, such as model=nano or model=sdxl")
        if self._other is None or self._other[0] != subject.weights:
            self._make_room()
            options = {"weights": subject.weights} | ({"loras": ()} if self._bakes else {})
            try:
                self._other = subject.weights, self._load(**options).to(self.device).eval()
            except UserError as error:
                raise UserError(str(error).replace("model.weights", f"subjects.{subject.name}")) from error
        return self._other[1]

    def _at_step(self, subject: Subject, step: int) -> DiffusionModel:
        """The run's model with the weights of a checkpoint: the average (EMA) if the run kept one."""
        path = subject.checkpoints[step]
        return self._with_weights(subject, trained_weights(path), path.name)

    def _averaged(self, subject: Subject, width: float) -> DiffusionModel:
        """The run's model with the average of its weights of this width."""
        return self._with_weights(subject, KeptAverages(subject.run or Path()).rebuild(width)[0], "averages")

    def _with_weights(self, subject: Subject, weights: Mapping[str, Tensor], name: str) -> DiffusionModel:
        """The run's model with these trainable parameters. name: of the file that they are from."""
        if self._rebuild is None or subject.run is None:
            raise UserError(f"{subject.key}: is no training run, and has no {name}")
        if self._other is None or self._other[0] != subject.run:
            self._make_room()
            model, self._tuning = self._rebuild(subject.run)
            self._other = subject.run, model.to(self.device).eval()
        model = self._other[1]
        if {parameter for parameter, _ in trainable_parameters(model)} != set(weights):
            raise UserError(f"{subject.key}: {name} holds other parameters than the run's config trains")
        copy_parameters(model, weights)
        return model


def trained_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The trained parameters of a checkpoint: their average (EMA) if the run kept one."""
    state = read_state(checkpoint)
    refuse_foreign(state, checkpoint)
    averages = [callback["average"] for callback in state["callbacks"].values() if "average" in callback]
    if averages:
        return averages[0]
    return {name.removeprefix("model."): value for name, value in state["state_dict"].items()}


@contextmanager
def with_lora(model: DiffusionModel, path: Path, key: str = "lora") -> Iterator[None]:
    """Context manager that applies a LoRA at full strength; on exit, modules and weights are bit for bit as before."""
    with applied_lora(model, read_lora(path, key), key):
        yield


@contextmanager
def trained_prediction_type(model: DiffusionModel, loras: Sequence[LoraFile], key: str) -> Iterator[None]:
    """Context manager that sets the prediction type and noise schedule for which the LoRAs were trained."""
    types = {prediction_of(lora) for lora in loras} - {None}
    if len(types) > 1:
        raise UserError(f"{key}: the LoRAs were trained for different noise schedules; they cannot be applied together")
    scheduler = model.scheduler
    if types:
        prediction, zero_snr = types.pop()  # type: ignore[misc]
        model.set_prediction_type(prediction, zero_snr or scheduler.config.rescale_betas_zero_snr)
    try:
        yield
    finally:
        model.scheduler = scheduler


def prediction_of(lora: LoraFile) -> tuple[str, bool] | None:
    """(v_prediction, zero terminal SNR) of a LoRA whose metadata says so; None for others, which fit any base model."""
    is_v = stated_prediction(lora.metadata) == "v_prediction"
    return ("v_prediction", says_zero_terminal_snr(lora.metadata)) if is_v else None


@lru_cache
def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    try:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


@lru_cache
def model_digest(weights: str, variant: str | None = None, allow_pickle: bool = False) -> str:
    """SHA-256 of a model's weights and of the configs and tokenizers beside them."""
    checkpoint = find_checkpoint(weights, variant, allow_pickle)
    files = set(checkpoint.files) or {checkpoint.root}
    if checkpoint.is_folder:
        files |= {file for kind in ("*.json", "*.txt") for file in checkpoint.root.rglob(kind)}
    names = {file: file.name if file == checkpoint.root else str(file.relative_to(checkpoint.folder)) for file in files}
    content = [[names[file], file_digest(file)] for file in sorted(files, key=names.__getitem__)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """The loading options that images depend on, as strings."""
    left_out = ("weights", "allow_pickle", *(name for name in ("loras", "merge_recipe") if not options.get(name)))
    return {name: str(value) for name, value in sorted(options.items()) if name not in left_out}


@contextmanager
def with_words(model: DiffusionModel, path: Path, key: str = "words") -> Iterator[None]:
    """Context manager that adds learned words; on exit, tokenizers and token embeddings are as before."""
    vectors, rows = read_words(path, key)
    tokenizers, vectors_before = (model.tokenizer, model.tokenizer_2), model.word_vectors
    tables = [encoder.get_input_embeddings() for _, encoder in model.context_encoders]
    model.tokenizer, model.tokenizer_2 = (copy.deepcopy(tokenizer) for tokenizer in tokenizers)
    try:
        try:
            model.add_words({word: word for word in vectors}, vectors)
        except UserError as error:
            raise UserError(f"{key}: the base model knows one of the words {list(vectors)} already") from error
        for name, row_ND in model.word_rows.items():
            if row_ND.shape != rows[name].shape:
                shapes = f"{list(rows[name].shape)} in the file, {list(row_ND.shape)} in the base model"
                raise UserError(f"{key}: {name} of {path.name} does not fit: {shapes}")
            row_ND.data.copy_(rows[name])
        yield
    finally:
        (model.tokenizer, model.tokenizer_2), model.word_vectors = tokenizers, vectors_before
        for (_, encoder), table in zip(model.context_encoders, tables, strict=True):
            encoder.set_input_embeddings(table)
