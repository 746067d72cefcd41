"""Converts models between folder and single file, and LoRAs between the key names of kohya and diffusers."""

from __future__ import annotations

from pathlib import Path

import torch

from sdft.errors import UserError
from sdft.formats.architecture import PARTS, empty_network, refuse_misfit
from sdft.formats.diffusers_folder import copy_as_folder
from sdft.formats.lora_file import is_lora, read_lora, read_names, write_lora_file
from sdft.formats.model_checkpoint import PICKLES, open_checkpoint
from sdft.formats.output import atomic_output
from sdft.formats.single_file import write_single_file
from sdft.progress import tqdm
from sdft.types import DTYPES

MODEL_FORMATS = ("folder", "single_file")
LORA_FORMATS = ("kohya", "diffusers")


def convert(
    source: str,
    out: str,
    to: str,
    config: Path,
    dtype: str | None = None,
    allow_pickle: bool = False,
    overwrite: bool = False,
    skip_unknown: bool = False,
) -> Path:
    """Write `source` as `out` in the format `to`; returns its path.

    to: `folder` (diffusers) or `single_file` (LDM) for a model; `kohya` or `diffusers` for a LoRA.
    config: the folder with the configs and tokenizers that a single file lacks; not used if `source` is a folder.
    dtype: fp32, bf16 or fp16, of the written weights; None keeps the dtype of each, and makes fp16 of 8-bit floats.
    skip_unknown: leave out the tensors of a LoRA file that cannot be read, with a warning.

    Raises UserError for anything that cannot be read or written; nothing is written then.
    """
    if to not in (*MODEL_FORMATS, *LORA_FORMATS):
        raise UserError(f"to={to}: must be one of {', '.join((*MODEL_FORMATS, *LORA_FORMATS))}")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: must be one of fp32, bf16, fp16, or null to keep each weight's own")
    path, target = Path(source).expanduser(), Path(out).expanduser().absolute()
    refuse_target(target, to, path)
    if not path.exists():
        raise UserError(f"in={source}: there is no such file or folder")
    number = DTYPES[dtype] if dtype else None
    with atomic_output(target, "out", overwrite) as written:
        if holds_lora(source, path):
            convert_lora(source, path, written, to, number, skip_unknown)
        elif to in LORA_FORMATS:
            raise UserError(f"to={to}: is a format of LoRA files, and in={source} is a whole model")
        else:
            convert_model(source, path, written, to, config, number, allow_pickle)
    return target


def refuse_target(target: Path, to: str, source: Path) -> None:
    """Raise UserError for a name that contradicts the format, and for an output inside the input."""
    if to == "folder" and target.suffix in (".safetensors", *PICKLES):
        raise UserError(f"out={target}: to=folder writes a folder; leave {target.suffix} out")
    if to != "folder" and target.suffix != ".safetensors":
        raise UserError(f"out={target}: to={to} writes a file that ends in .safetensors")
    resolved, root = target.resolve(), source.resolve()
    if resolved.is_relative_to(root) or root.is_relative_to(resolved):
        raise UserError(f"out={target}: contains the input or is inside it; choose another path")


def holds_lora(source: str, path: Path) -> bool:
    """Whether a file is a LoRA."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return is_lora(read_names(f"in={source}", path)[0])


def convert_model(
    source: str, path: Path, written: Path, to: str, config: Path, dtype: torch.dtype | None, allow_pickle: bool
) -> None:
    """Convert a model; all its key names and shapes are checked before anything is written."""
    checkpoint = open_checkpoint("in", path, allow_pickle)
    folder = path if checkpoint.is_folder else config
    refuse_misfit(f"in={source}", checkpoint, {part: empty_network(part, folder / part) for part in PARTS})
    with tqdm(total=checkpoint.num_bytes, desc=f"writing {to}", unit="B", unit_scale=True) as bar:
        if to == "folder":
            copy_as_folder(checkpoint, written, folder, dtype, bar)
        else:
            write_single_file(checkpoint, written, dtype, bar=bar)


def convert_lora(
    source: str, path: Path, written: Path, to: str, dtype: torch.dtype | None, skip_unknown: bool = False
) -> None:
    """Convert a LoRA file."""
    if to in MODEL_FORMATS:
        raise UserError(f"to={to}: in={source} is a LoRA; pass to=kohya or to=diffusers, or bake it by merging")
    lora = read_lora(path, f"in={source}", skip_unknown)
    write_lora_file(lora, written, "kohya" if to == "kohya" else "diffusers", dtype, lora.metadata)
