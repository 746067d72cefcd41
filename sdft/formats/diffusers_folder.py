"""Writes a model as a folder that diffusers and transformers load.

Weights are written one tensor at a time, in a given dtype, with the key names of folders on the Hub.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sdft.formats.json_file import read_json
from sdft.formats.keys import PREFIXES, hub_name
from sdft.formats.model_checkpoint import INDEX, LOGIT_SCALE_KEY, Checkpoint
from sdft.formats.output import atomic_output
from sdft.formats.safetensors_io import DTYPE_NAMES, TensorInfo, write_tensors
from sdft.progress import tqdm
from sdft.protocols import DiffusionModel

SDXL_PARTS = (*PREFIXES, "tokenizer", "tokenizer_2", "scheduler")
FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
RESCALED = "rescale_betas_zero_snr"
INPAINTING = 9
"""Input channels of a UNet that also gets a mask and the masked image."""
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
    if not checkpoint.is_folder or checkpoint.told is not None:
        write_prediction_type(folder / "scheduler" / "scheduler_config.json", checkpoint)
    write_input_channels(folder, checkpoint)


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
    config, (prediction, zero_snr) = read_json(file), checkpoint.predicts
    if prediction == config.get("prediction_type", "epsilon") and zero_snr == bool(config.get(RESCALED)):
        return
    config["prediction_type"] = prediction
    if prediction == "flow_prediction":
        config |= {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}
    if zero_snr:
        config |= {RESCALED: True, "timestep_spacing": "trailing"}
    elif config.pop(RESCALED, False):
        config["timestep_spacing"] = "leading"  # as in SDXL
    write_json(file, config)


def write_input_channels(folder: Path, checkpoint: Checkpoint) -> None:
    """Write into the UNet's config how many channels its weights take: 9 in inpainting models, 4 in others."""
    view = checkpoint.weights.get("unet/conv_in.weight")
    file, index = folder / "unet" / "config.json", folder / INDEX
    if view is None or (config := read_json(file)).get("in_channels", 4) == view.shape[1]:
        return
    write_json(file, config | {"in_channels": view.shape[1]})
    if view.shape[1] == INPAINTING:
        write_json(index, read_json(index) | {"_class_name": "StableDiffusionXLInpaintPipeline"})


def write_json(file: Path, content: Mapping[str, object]) -> None:
    """Write a config as diffusers does."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module, or a copy of it in `dtype`."""
    return module if module.dtype == dtype else copy.deepcopy(module).to(dtype)
