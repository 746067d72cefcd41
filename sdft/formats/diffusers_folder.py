"""A whole model as the folder that diffusers and transformers load."""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

SDXL_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


def write_folder(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save `model` (an SDXL, or one diffusers or transformers model) as `folder`, which appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-") as temporary:
        written = Path(temporary) / folder.name
        savable(model, dtype).save_pretrained(written)
        if folder.exists():
            shutil.rmtree(folder)
        written.replace(folder)


def savable(model: nn.Module, dtype: torch.dtype):
    """An object with `save_pretrained` in `dtype`; the model itself keeps its own."""
    if hasattr(model, "save_pretrained"):
        return in_dtype(model, dtype)
    parts = {part: getattr(model, part) for part in SDXL_PARTS}
    parts = {name: in_dtype(part, dtype) if isinstance(part, nn.Module) else part for name, part in parts.items()}
    zeros = model.empty_prompt == "zeros"
    return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)


def in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module, or a copy of it where its dtype differs."""
    return module if module.dtype == dtype else copy.deepcopy(module).to(dtype)
