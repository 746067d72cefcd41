"""The sources of a merge: models, LoRAs and importances in any format of `sdft.formats`; headers are read first.

Must not depend on methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sdft.errors import UserError, listed
from sdft.formats.importance import open_importance
from sdft.formats.keys import PREFIXES
from sdft.formats.lora_file import is_lora, read_lora, read_names
from sdft.formats.lora_layer import Layer, LoraFile, misfits
from sdft.formats.model_checkpoint import Checkpoint, open_checkpoint, refuse_incomplete
from sdft.formats.run_folder import RunOutputs, read_run_outputs
from sdft.merging.annotations import Kind
from sdft.models.nano import WEIGHTS as NANO

HALF_OF_SDXL = 840
"""Weights of the UNet; smaller ones are models for tests, of any number of layers."""


@dataclass(frozen=True)
class TensorSource:
    """A file or folder with tensors named like a model's weights.

    where: `key=path`, which error messages start with.
    """

    where: str
    checkpoint: Checkpoint

    @property
    def root(self) -> Path:
        return self.checkpoint.root

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def files(self) -> list[Path]:
        return self.checkpoint.files


class Model(TensorSource):
    """A model checkpoint."""

    kind = Kind.WEIGHT


class Importance(TensorSource):
    """The importance of a model's weights (mean squared gradients); it lacks weights that were not measured."""

    kind = Kind.IMPORTANCE


@dataclass(frozen=True)
class Adapter:
    """A LoRA file; a layer `part/module` is a delta of the weight `part/module.weight`."""

    where: str
    root: Path
    lora: LoraFile
    kind = Kind.DELTA

    @property
    def folder(self) -> Path:
        return self.root.parent

    @property
    def files(self) -> list[Path]:
        return [self.root]

    @property
    def kinds_on_base(self) -> list[str]:
        """Which kinds it has whose delta depends on the base weight, in words."""
        kinds = {layer.kind for layer in self.lora.layers.values()}
        return [name for kind, name in {"dora": "a DoRA", "oft": "an OFT", "boft": "a BOFT"}.items() if kind in kinds]

    def layer_of(self, weight: str) -> Layer | None:
        """The layer that changes a weight, or None."""
        return self.lora.layers.get(weight.removesuffix(".weight")) if weight.endswith(".weight") else None

    def tensors_of(self, weight: str) -> list[Tensor]:
        """All tensors that change a weight."""
        layer, vector = self.layer_of(weight), self.lora.vectors.get(weight)
        return [*(layer.tensors.values() if layer else ()), *([] if vector is None else [vector])]


Source = Model | Importance | Adapter


def open_source(key: str, source: str) -> Source:
    """Open the input `source` (`nano`, a run folder, a model or a LoRA) by its headers; errors name it by `key`."""
    where, path = f"{key}={source}", NANO if source == "nano" else Path(source).expanduser()
    try:
        outputs = read_run_outputs(path)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if outputs is not None:
        path = run_weights(where, outputs)
    if path.suffix == ".safetensors" and path.is_file():
        if is_lora(read_names(where, path)[0]):
            return Adapter(where, path, read_lora(path, where))
        if (importance := open_importance(where, path)) is not None:
            return Importance(where, importance)
    elif path.is_file():
        raise UserError(f"{where}: is not a .safetensors file; pass nano, a model folder or a .safetensors file")
    checkpoint = open_checkpoint(key, path)
    if checkpoint.unknown:
        count, first = len(checkpoint.unknown), checkpoint.unknown[0]
        raise UserError(f"{where}: has {count} tensors that SDXL does not have, for example {first}")
    refuse_incomplete(where, checkpoint)
    if sum(name.startswith("unet/") for name in checkpoint.weights) >= HALF_OF_SDXL:
        refuse_missing_weights(where, checkpoint)
    return Model(where, checkpoint)


def refuse_missing_weights(where: str, checkpoint: Checkpoint) -> None:
    """Raise UserError if a checkpoint of SDXL's size lacks some of its weights."""
    from sdft.formats.architecture import empty_network, parameter_names  # imports diffusers, which takes seconds
    from sdft.models.load import SDXL_BASE

    networks = {part: empty_network(part, SDXL_BASE / part) for part in PREFIXES}
    expected = [weight for part, network in networks.items() for weight in parameter_names(part, network)]
    if missing := [weight for weight in expected if weight not in checkpoint.weights]:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{where}: is incomplete, it lacks {missing[0]}{others}; get it again")


def run_weights(where: str, outputs: RunOutputs) -> Path:
    """The trained weights of a run. Raises UserError if it has none, or new words, which a merge cannot contain."""
    if outputs.weights is None or not outputs.weights.exists():
        raise UserError(f"{where}: the run has neither a LoRA nor a model; pass a finished run, or a file")
    if "words" in outputs.artifacts:
        reason = "the run also trained new words, which a merge cannot contain"
        raise UserError(f"{where}: {reason}; to merge its other weights, pass {outputs.weights}")
    return outputs.weights


def refuse_mismatch(models: Sequence[Model], adapters: Sequence[Adapter], importances: Sequence[Importance]) -> None:
    """Raise UserError that names every weight whose name or shape differs between the inputs."""
    if not models:
        return
    problems: list[str] = []
    first = models[0]
    for other in models[1:]:
        a, b = first.checkpoint.weights, other.checkpoint.weights
        problems += [f"only in {first.where}: {name}" for name in a if name not in b]
        problems += [f"only in {other.where}: {name}" for name in b if name not in a]
        problems += [
            f"{name}: {list(a[name].shape)} in {first.where}, {list(b[name].shape)} in {other.where}"
            for name in a
            if name in b and a[name].shape != b[name].shape
        ]
    shapes = {name: view.shape for name, view in first.checkpoint.weights.items()}
    for adapter in adapters:
        problems += adapter_mismatches(adapter, shapes, first.where)
    for importance in importances:
        measured = {name: view.shape for name, view in importance.checkpoint.weights.items()}
        problems += [
            f"{name}: {list(shape)} in {importance.where}, {list(shapes.get(name, ())) or 'nothing'} in {first.where}"
            for name, shape in measured.items()
            if shapes.get(name) != shape
        ]
    if problems:
        raise UserError(f"the inputs differ in {len(problems)} weights, so they cannot be merged:\n{listed(problems)}")


def adapter_mismatches(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], model: str) -> list[str]:
    """One line for each layer without a weight of its shape in the model."""
    problems = []
    for name, rows, columns, there, is_vector in misfits(adapter.lora, shapes, shapes):
        if there is None:
            problems.append(f"only in {adapter.where}: {name}")
        else:
            size = f"a rotation of {rows} rows" if columns is None else f"a delta of {rows} x {columns}"
            size = f"a change of [{rows}]" if is_vector else size
            problems.append(f"{name}: {list(there)} in {model}, {size} in {adapter.where}")
    return problems
