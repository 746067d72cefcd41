"""Writes a model as a folder that diffusers and transformers load.

Weights are written one tensor at a time, in a given dtype, with the key names of folders on the Hub.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from sdft.formats.keys import PREFIXES, hub_name
from sdft.formats.model_checkpoint import INDEX, LOGIT_SCALE_KEY, Checkpoint
from sdft.formats.safetensors_io import DTYPE_NAMES, TensorInfo, atomic_output, write_tensors
from sdft.progress import tqdm
from sdft.protocols import DiffusionModel

SDXL_PARTS = (*PREFIXES, "tokenizer", "tokenizer_2", "scheduler")
FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.ckpt", "*.pt", "*.msgpack", "*.onnx*", "*.index.json")


def write_folder(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save `model` (an SDXL, or a single diffusers or transformers model) as `folder`, atomically."""
    with atomic_output(folder, overwrite=True) as written:
        if not isinstance(model, DiffusionModel):
            in_dtype(model, dtype).save_pretrained(written)
            return
        save_all_but_weights(model, written, dtype)
        for part, file in FILES.items():
            tensors = {hub_name(part, name): tensor for name, tensor in getattr(model, part).state_dict().items()}
            entries = {name: TensorInfo(DTYPE_NAMES[dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
            write_tensors(written / part / file, entries, {"format": "pt"}, tensors.__getitem__)


def save_all_but_weights(model: DiffusionModel, folder: Path, dtype: torch.dtype) -> None:
    """Write model_index.json, configs, tokenizers and scheduler."""
    parts = {part: getattr(model, part) for part in SDXL_PARTS}
    model.pipeline().save_config(folder)
    for part in ("tokenizer", "tokenizer_2", "scheduler"):
        parts[part].save_pretrained(folder / part)
    for part in ("unet", "vae"):
        parts[part].save_config(folder / part)
    for part in ("text_encoder", "text_encoder_2"):
        config = copy.deepcopy(parts[part].config)
        config.dtype, config.architectures = dtype, [type(parts[part]).__name__]
        config.save_pretrained(folder / part)


def copy_as_folder(
    checkpoint: Checkpoint, folder: Path, config: Path, dtype: torch.dtype | None = None, bar: tqdm | None = None
) -> None:
    """Write a checkpoint of any format as `folder`; everything except weights is copied from the folder `config`."""
    copy_all_but_weights(checkpoint, folder, config)
    with checkpoint.opened() as read:
        for part, file in FILES.items():
            entries = {
                weight.removeprefix(f"{part}/"): TensorInfo(DTYPE_NAMES[dtype] if dtype else view.dtype, view.shape)
                for weight, view in checkpoint.weights.items()
                if weight.startswith(f"{part}/")
            }
            write_tensors(folder / part / file, entries, part_metadata(part, checkpoint), part_reader(read, part), bar)


def copy_all_but_weights(checkpoint: Checkpoint, folder: Path, config: Path) -> None:
    """Copy everything except weights from the folder `config`; for a single file, write its prediction type."""
    folder.mkdir()
    shutil.copy2(config / INDEX, folder)
    for part in SDXL_PARTS:
        shutil.copytree(config / part, folder / part, ignore=shutil.ignore_patterns(*WEIGHT_FILES))
    if not checkpoint.is_folder:
        write_prediction_type(folder / "scheduler" / "scheduler_config.json", checkpoint)


def part_metadata(part: str, checkpoint: Checkpoint) -> dict[str, str]:
    """The safetensors metadata of one part's file."""
    scale = checkpoint.logit_scale() if part == "text_encoder_2" else None
    metadata = {"format": "pt"}
    if scale is not None:
        metadata[LOGIT_SCALE_KEY] = f"{DTYPE_NAMES[scale.dtype]}:{scale.item()!r}"
    return metadata


def part_reader(read: Callable[[str], Tensor], part: str) -> Callable[[str], Tensor]:
    """A function that reads a weight of one part by its name in the part."""
    return lambda name: read(f"{part}/{name}")


def write_prediction_type(file: Path, checkpoint: Checkpoint) -> None:
    """Write the prediction type and zero terminal SNR of a checkpoint into a scheduler config."""
    config: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
    config["prediction_type"] = checkpoint.prediction or "epsilon"
    if checkpoint.zero_terminal_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module, or a copy of it in `dtype`."""
    return module if module.dtype == dtype else copy.deepcopy(module).to(dtype)
