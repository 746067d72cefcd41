"""Files of weight importance (mean squared gradients): one safetensors file with the names of the weights.

Must not depend on how importance is measured or used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sdft.formats.keys import hub_name
from sdft.formats.model_checkpoint import Checkpoint, WeightView
from sdft.formats.output import atomic_output
from sdft.formats.safetensors_io import read_header, tensor_info, write_tensors

FILE = "importance.safetensors"
METADATA_KEY = "sdft.importance"
"""The metadata key of such a file; its value says what was measured."""


def write_importance(importance: Mapping[str, Tensor], path: Path) -> None:
    """Save fp32 tensors by the names of SDXL's parameters, such as `unet.conv_in.weight`, atomically."""
    tensors = {}
    for parameter, tensor in importance.items():
        part, _, name = parameter.partition(".")
        tensors[f"{part}/{hub_name(part, name)}"] = tensor
    entries = {name: tensor_info(tensor) for name, tensor in tensors.items()}
    with atomic_output(path, overwrite=True) as written:
        write_tensors(written, entries, {"format": "pt", METADATA_KEY: "mean squared gradient"}, tensors.__getitem__)


def open_importance(where: str, path: Path) -> Checkpoint | None:
    """An importance file as a checkpoint of `part/name`, from its header; None if it is not an importance file."""
    stored, metadata = read_header(where, path)
    if METADATA_KEY not in metadata:
        return None
    return Checkpoint(path, {one.name: WeightView(one.dtype, one.shape, one) for one in stored}, [], metadata)
