"""Writes a model as a single file with LDM's key names, for ComfyUI, A1111 and kohya, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sdft.formats.keys import PREFIXES, KeyMapping, mapping_for_weight
from sdft.formats.metadata import PREDICTION_TYPE, model_metadata
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

    dtype: of the weights; None keeps theirs. metadata: added to that of the checkpoint.
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
        compute = tensor_computer(places, extras, read)
        write_tensors(path, entries, file_metadata(checkpoint) | (metadata or {}), compute, bar)


def tensor_computer(
    places: dict[str, KeyMapping], extras: dict[str, Tensor], read: Callable[[str], Tensor]
) -> Callable[[str], Tensor]:
    """A function that computes a tensor of the file by its name."""

    def compute(name: str) -> Tensor:
        if name in extras:
            return extras[name]
        place = places[name]
        tensors = [read(weight) for weight in place.weights]
        wide = max((tensor.dtype for tensor in tensors), key=lambda one: one.itemsize)
        return place.to_single([tensor.to(wide) for tensor in tensors])

    return compute


def single_entry(checkpoint: Checkpoint, place: KeyMapping, dtype: torch.dtype | None) -> TensorInfo:
    """Dtype and shape of a tensor of the file; several weights in one tensor take the widest of their dtypes."""
    views = [checkpoint.weights[weight] for weight in place.weights]
    code = DTYPE_NAMES[dtype] if dtype else max((view.dtype for view in views), key=ITEM_SIZES.__getitem__)
    return TensorInfo(code, place.single_shape(views[0].shape))


def logit_scale(checkpoint: Checkpoint, entries: dict[str, TensorInfo], dtype: torch.dtype | None) -> Tensor:
    """CLIP's `logit_scale` from the checkpoint, else SDXL's: OpenCLIP's maximum, ln 100."""
    scale = checkpoint.logit_scale()
    if scale is None:
        scale = torch.tensor(math.log(100), dtype=DTYPES[entries[TEXT_PROJECTION].dtype])
    return scale if dtype is None else scale.to(dtype)


def marks(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The empty tensors by which ComfyUI and others recognise v-prediction and zero terminal SNR."""
    flags = {"v_pred": checkpoint.prediction == "v_prediction", "ztsnr": checkpoint.zero_terminal_snr}
    return {name: torch.empty(0) for name, present in flags.items() if present}


def file_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """The metadata of the checkpoint, with defaults for what it lacks."""
    defaults = model_metadata(checkpoint.root.stem, checkpoint.predicts.type)
    own = {name: value for name, value in checkpoint.metadata.items() if name != LOGIT_SCALE_KEY and "hash" not in name}
    predicted = {PREDICTION_TYPE: defaults[PREDICTION_TYPE]} if checkpoint.told is not None else {}
    return defaults | own | predicted
