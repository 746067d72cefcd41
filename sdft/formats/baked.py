"""LoRAs baked into a model's weights as they are read: W + scale delta, one after another, in fp32.

Knows what a run is to remember of them: a LoRA that is trained on such a base is a change of that base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from sdft.errors import UserError
from sdft.formats.lora_delta import dora_delta, lora_delta, rotation_delta
from sdft.formats.lora_file import read_lora
from sdft.formats.lora_layer import DORA, ROTATIONS, LoraFile, misfits
from sdft.formats.metadata import says_zero_terminal_snr, stated_prediction
from sdft.formats.model_checkpoint import Checkpoint, Predicts
from sdft.formats.run_folder import read_run_outputs
from sdft.formats.safetensors_io import StoredTensor

KEY = "model.loras"
BASE_KEY = "sdft.base_loras"
"""In the metadata of a LoRA: those that were baked into its base, as JSON."""
MERGE_KEY = "sdft.base_merge"
"""The same, the recipe by which its base was merged."""
LoraOption = Mapping[Literal["lora", "scale"], str | float]
"""{lora: FILE or run folder, scale: 1.0}"""


@dataclass(frozen=True)
class BakedLora:
    """A LoRA and its strength."""

    path: Path
    lora: LoraFile
    scale: float

    def described(self) -> dict[str, Any]:
        """What it was, for metadata and receipts."""
        with self.path.open("rb") as file:
            return {
                "lora": self.path.name,
                "scale": self.scale,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }


@dataclass
class BakedCheckpoint(Checkpoint):
    """A checkpoint whose weights are read with LoRAs added to them."""

    loras: Sequence[BakedLora] = ()

    def read(self, weight: str, tensor: Callable[[StoredTensor], Tensor]) -> Tensor:
        """One weight: as it is stored, or in fp32 if a LoRA changes it."""
        value, name = super().read(weight, tensor), weight.removesuffix(".weight")
        for baked in self.loras:
            if (change := baked.lora.vectors.get(weight)) is not None:
                value = value.float() + baked.scale * change.float()
            if (layer := baked.lora.layers.get(name)) is not None and weight != name:
                base = value.float()
                if layer.kind in ROTATIONS:
                    delta = rotation_delta(layer, base)
                else:
                    delta = lora_delta(layer).reshape(base.shape)
                if DORA in layer.tensors:
                    delta = dora_delta(layer, delta, base, slice(None))
                value = base + baked.scale * delta
        return value


def open_loras(options: Sequence[LoraOption]) -> list[BakedLora]:
    """The LoRAs of the option `model.loras`. Raises UserError for one that cannot be read."""
    found = []
    for place, option in enumerate(options):
        where = f"{KEY}[{place}]"
        if not isinstance(option.get("lora"), str):
            raise UserError(f"{where} has no file: write {KEY}=[{{lora: FILE, scale: 1.0}}]")
        path = lora_of(f"{where}.lora", Path(str(option["lora"])).expanduser())
        if (scale := float(option.get("scale", 1.0))) != 0:
            found.append(BakedLora(path, read_lora(path, f"{where}.lora={path}"), scale))
    return found


def lora_of(key: str, path: Path) -> Path:
    """The file at a path, or the LoRA of the run folder there. key: of the option that names it."""
    if not path.is_dir():
        return path
    outputs = read_run_outputs(path)
    if outputs is None or outputs.lora is None:
        raise UserError(f"{key}={path}: the folder is no finished run with a LoRA; pass the file of a LoRA")
    if "words" in outputs.artifacts:
        reason = "the run also trained new words, which its LoRA does not hold"
        raise UserError(f"{key}={path}: {reason}; pass {outputs.lora} to use it without them")
    return outputs.lora


def baked(checkpoint: Checkpoint, loras: Sequence[BakedLora]) -> Checkpoint:
    """The checkpoint with LoRAs baked in. Raises UserError for one that does not fit its weights.

    A LoRA that was trained for v makes a model that predicts v of it, as in merges.
    """
    if not loras:
        return checkpoint
    shapes = {name: tuple(view.shape) for name, view in checkpoint.weights.items()}
    for one in loras:
        refuse_unfit(one, shapes)
    same = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    return BakedCheckpoint(**same | {"told": predicts(checkpoint, loras)}, loras=loras)


def predicts(checkpoint: Checkpoint, loras: Sequence[BakedLora]) -> Predicts | None:
    """What the result predicts, where the LoRAs decide it."""
    metadata = [one.lora.metadata for one in loras]
    if not any(stated_prediction(own) == "v_prediction" for own in metadata):
        return checkpoint.told
    zero_snr = checkpoint.zero_terminal_snr or any(map(says_zero_terminal_snr, metadata))
    return Predicts("v_prediction", zero_snr)


def refuse_unfit(one: BakedLora, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError if a layer of a LoRA has no weight, or one of another shape. shapes: of all weights."""
    wrong = []
    for name, rows, columns, there, is_vector in misfits(one.lora, shapes, shapes):
        if is_vector:
            wrong.append(f"{name} changes {rows} numbers, and the model has {list(there or ())}")
        elif there is None:
            wrong.append(f"{name} is missing in the model")
        else:
            size = f"{rows} rows" if columns is None else f"{rows} x {columns} weights"
            wrong.append(f"{name} changes {size}, and the model has {list(there)} there")
    if wrong:
        example = f"{len(wrong)} of {len(one.lora.layers) + len(one.lora.vectors)} layers, for example {wrong[0]}"
        raise UserError(f"{KEY}: {one.path} does not fit the weights, which model= chooses ({example})")


def base_metadata(model: Any) -> dict[str, str]:
    """The metadata entry of a LoRA that was trained on a model, about its base; empty for one as it was loaded."""
    found = {BASE_KEY: getattr(model, "baked", []), MERGE_KEY: getattr(model, "merged", {})}
    return {key: json.dumps(one, sort_keys=True, ensure_ascii=False) for key, one in found.items() if one}


def refuse_other_base(key: str, metadata: Mapping[str, str], model: Any) -> None:
    """Raise UserError for a LoRA whose base had LoRAs baked in that the model has not."""
    if BASE_KEY not in metadata or metadata[BASE_KEY] == base_metadata(model).get(BASE_KEY):
        return
    try:
        named = ", ".join(f"{one['lora']} at {one['scale']:g}" for one in json.loads(metadata[BASE_KEY]))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{key}: its metadata ({BASE_KEY}) cannot be read ({error})") from error
    raise UserError(
        f"{key}: the LoRA was trained on a base with others baked in ({named}); pass the same 'model.loras=[{{lora: "
        "FILE, scale: 1.0}]'"
    )
