"""What goes into a merge: whole models, LoRAs and importances, in any format that `formats` reads; headers first.

Knows how a LoRA's layer changes a weight. Must not know methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdft.errors import UserError
from sdft.formats.importance import open_importance
from sdft.formats.lora_file import is_lora, read_lora, read_names
from sdft.formats.lora_layer import DORA, Layer, LoraFile
from sdft.formats.model_checkpoint import Checkpoint, open_checkpoint
from sdft.formats.run_folder import RunOutputs, read_run_outputs
from sdft.merging.annotations import Kind
from sdft.models.nano import WEIGHTS as NANO


@dataclass(frozen=True)
class TensorSource:
    """Tensors by the names of a model's weights."""

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
    """A checkpoint, whose weights are weights."""

    kind = Kind.WEIGHT


class Importance(TensorSource):
    """How much the weights of a model matter to its loss; what was not measured is not in it."""

    kind = Kind.IMPORTANCE


@dataclass(frozen=True)
class Adapter:
    """A LoRA, whose layers are deltas of the weights `part/module.weight`."""

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
    def depends_on_base(self) -> bool:
        return any(DORA in layer.tensors for layer in self.lora.layers.values())

    def layer_of(self, weight: str) -> Layer | None:
        """What changes a weight; none where the LoRA leaves it as it is."""
        return self.lora.layers.get(weight.removesuffix(".weight")) if weight.endswith(".weight") else None


Source = Model | Importance | Adapter


def open_source(key: str, source: str) -> Source:
    """The input that `source` names, from headers alone; `key` names it in errors."""
    where, path = f"{key}={source}", NANO if source == "nano" else Path(source).expanduser()
    if (left := read_run_outputs(path)) is not None:
        path = run_weights(where, left)
    if path.suffix == ".safetensors" and path.is_file():
        if is_lora(read_names(where, path)[0]):
            return Adapter(where, path, read_lora(path, where))
        if (importance := open_importance(where, path)) is not None:
            return Importance(where, importance)
    elif path.is_file():
        raise UserError(f"{where}: is no .safetensors file; pass nano, a model folder or a .safetensors file")
    checkpoint = open_checkpoint(key, path)
    if checkpoint.unknown:
        found, first = len(checkpoint.unknown), checkpoint.unknown[0]
        raise UserError(f"{where}: holds {found} tensors that SDXL does not have, for example {first}")
    return Model(where, checkpoint)


def run_weights(where: str, left: RunOutputs) -> Path:
    """What a run learned, where a merge can hold it."""
    if left.weights is None or not left.weights.exists():
        raise UserError(f"{where}: the run left neither a LoRA nor a model; pass a finished run, or a file")
    if "words" in left.artifacts:
        message = "the run learned new words too, which no merge can hold"
        raise UserError(f"{where}: {message}; to merge what else it learned, pass {left.weights}")
    return left.weights


def refuse_mismatch(models: Sequence[Model], adapters: Sequence[Adapter], importances: Sequence[Importance]) -> None:
    """Raise UserError that names every weight in which the inputs do not fit each other."""
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
        said = first.checkpoint.prediction, other.checkpoint.prediction
        if None not in said and said[0] != said[1]:
            message = f"{first.where} predicts {said[0]} and {other.where} {said[1]}"
            raise UserError(f"{message}: a blend of the two means nothing")
    shapes = {name: view.shape for name, view in first.checkpoint.weights.items()}
    for adapter in adapters:
        problems += adapter_mismatches(adapter, shapes, first.where)
    for importance in importances:
        held = {name: view.shape for name, view in importance.checkpoint.weights.items()}
        problems += [
            f"{name}: {list(shape)} in {importance.where}, {list(shapes.get(name, ())) or 'nothing'} in {first.where}"
            for name, shape in held.items()
            if shapes.get(name) != shape
        ]
    if problems:
        message = "\n".join(f"  {line}" for line in problems)
        raise UserError(f"the inputs do not fit each other in {len(problems)} weights:\n{message}")


def adapter_mismatches(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], model: str) -> list[str]:
    """One line for each layer that the model has no place for."""
    problems = []
    for name, layer in adapter.lora.layers.items():
        rows, columns = layer.delta_shape
        shape = shapes.get(f"{name}.weight")
        if shape is None:
            problems.append(f"only in {adapter.where}: {name}")
        elif (shape[0], torch.Size(shape[1:]).numel()) != (rows, columns):
            problems.append(f"{name}: {list(shape)} in {model}, a change of {rows} x {columns} in {adapter.where}")
    return problems


def lora_delta(layer: Layer) -> Tensor:
    """fp32 rows x columns: what a layer adds to its weight; of a DoRA, before its rows are rescaled."""
    held = {name: tensor.float() for name, tensor in layer.tensors.items()}
    if layer.kind == "loha":
        product = loha_factor(held, "1") * loha_factor(held, "2")
    elif layer.kind == "lokr":
        product = kronecker(lokr_factor(held, "1"), lokr_factor(held, "2"))
    elif "lora_mid.weight" in held:
        down, up = held["lora_down.weight"].flatten(1), held["lora_up.weight"].flatten(1)
        product = torch.einsum("or,rshw,si->oihw", up, held["lora_mid.weight"], down)
    else:
        product = held["lora_up.weight"].flatten(1) @ held["lora_down.weight"].flatten(1)
    return product.flatten(1) * layer.scale


def dora_delta(layer: Layer, change: Tensor, base: Tensor, rows: slice) -> Tensor:
    """A DoRA's change of some rows of a weight: their directions are moved, their norms are set."""
    moved = base + change
    norms = moved.flatten(1).norm(dim=1)
    wanted = layer.tensors[DORA].flatten()[rows].to(base.dtype)
    return moved * (wanted / norms).reshape(-1, *[1] * (base.dim() - 1)) - base


def loha_factor(held: Mapping[str, Tensor], i: str) -> Tensor:
    a, b = held[f"hada_w{i}_a"], held[f"hada_w{i}_b"]
    if f"hada_t{i}" in held:  # LyCORIS: a is rank x out there, b rank x in
        return torch.einsum("rshw,ro,si->oihw", held[f"hada_t{i}"], a, b)
    return a @ b


def lokr_factor(held: Mapping[str, Tensor], i: str) -> Tensor:
    if f"lokr_w{i}" in held:
        return held[f"lokr_w{i}"]
    a, b = held[f"lokr_w{i}_a"], held[f"lokr_w{i}_b"]
    if f"lokr_t{i}" in held:
        return torch.einsum("rshw,ro,si->oihw", held[f"lokr_t{i}"], a, b)
    return a @ b


def kronecker(a: Tensor, b: Tensor) -> Tensor:
    """Of two matrices, or of a matrix and a convolution's kernel."""
    dims = max(a.dim(), b.dim())
    return torch.kron(*(t.reshape(*t.shape, *[1] * (dims - t.dim())) for t in (a, b)))
