"""A whole model as one file, as ComfyUI, A1111 and kohya read it (LDM names).

Knows how weights become the tensors of that file; reads and writes them one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sdft.formats.keys import PREFIXES, KeyMapping, mapping_for_weight
from sdft.formats.metadata import model_metadata
from sdft.formats.model_checkpoint import LOGIT_SCALE, LOGIT_SCALE_KEY, Checkpoint
from sdft.formats.safetensors_io import DTYPE_NAMES, DTYPES, ITEM_SIZES, TensorInfo, tensor_info, write_tensors
from sdft.progress import tqdm

TEXT_PROJECTION = f"{PREFIXES['text_encoder_2']}text_projection"


def write_single_file(
    checkpoint: Checkpoint,
    path: Path,
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
    bar: tqdm | None = None,
) -> None:
    """Write a checkpoint of any format as one file at `path`.

    dtype: of the weights; their own where not said. metadata: what the file says of itself, beyond what it said before.
    """
    places = {}
    for weight in checkpoint.weights:
        part, _, name = weight.partition("/")
        place = mapping_for_weight(part, name, checkpoint.num_vae_levels)
        places[place.single] = place
    entries = {name: single_entry(checkpoint, place, dtype) for name, place in places.items()}
    extras = marks(checkpoint) | {LOGIT_SCALE: logit_scale(checkpoint, entries, dtype)}
    entries |= {name: tensor_info(tensor) for name, tensor in extras.items()}
    with checkpoint.opened() as read:
        write_tensors(path, entries, file_metadata(checkpoint) | (metadata or {}), tensor_computer(places, extras, read), bar)


def tensor_computer(
    places: dict[str, KeyMapping], extras: dict[str, Tensor], read: Callable[[str], Tensor]
) -> Callable[[str], Tensor]:
    """A function that makes one tensor of the file."""

    def compute(name: str) -> Tensor:
        if name in extras:
            return extras[name]
        place = places[name]
        tensors = [read(weight) for weight in place.weights]
        wide = max((tensor.dtype for tensor in tensors), key=lambda one: one.itemsize)
        return place.to_single([tensor.to(wide) for tensor in tensors])

    return compute


def single_entry(checkpoint: Checkpoint, place: KeyMapping, dtype: torch.dtype | None) -> TensorInfo:
    """What the file will say of one tensor; several weights in one take the widest of their dtypes."""
    views = [checkpoint.weights[weight] for weight in place.weights]
    code = DTYPE_NAMES[dtype] if dtype else max((view.dtype for view in views), key=ITEM_SIZES.__getitem__)
    return TensorInfo(code, place.single_shape(views[0].shape))


def logit_scale(checkpoint: Checkpoint, entries: dict[str, TensorInfo], dtype: torch.dtype | None) -> Tensor:
    """CLIP's temperature as it was read; else OpenCLIP's ceiling, ln 100, which is SDXL's."""
    said = checkpoint.logit_scale()
    if said is None:
        said = torch.tensor(math.log(100), dtype=DTYPES[entries[TEXT_PROJECTION].dtype])
    return said if dtype is None else said.to(dtype)


def marks(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The empty tensors by which ComfyUI and others know a v-prediction model and its noise schedule."""
    found = {"v_pred": checkpoint.prediction == "v_prediction", "ztsnr": checkpoint.zero_terminal_snr}
    return {name: torch.empty(0) for name, there in found.items() if there}


def file_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """What the source says of itself, over what can be said of any model."""
    said = model_metadata(checkpoint.root.stem, checkpoint.prediction or "epsilon")
    kept = {name: value for name, value in checkpoint.metadata.items() if name != LOGIT_SCALE_KEY and "hash" not in name}
    return said | kept
