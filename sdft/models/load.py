"""SDXL from where it lies: shipped nano, a hub id, a diffusers folder or one `.safetensors` file.

The only concept that may use `formats`. Everything is safetensors; a pickle is refused.
"""

from __future__ import annotations

import os
from pathlib import Path

import diffusers.utils.logging
import torch
import transformers.utils.logging
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from sdft.models.sdxl import SDXL, EmptyPrompt
from sdft.types import UserError

# Their bars count files, not bytes; `train.py` says what is being loaded.
diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

NANO = Path(__file__).parent / "nano" / "weights"
_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")


def pretrained(
    weights: str,
    vae: str | None = None,
    empty_prompt: EmptyPrompt | None = None,
    gradient_checkpointing: bool = False,
) -> SDXL:
    """The model with the given weights, in fp32; the trainer's precision decides the arithmetic.

    weights: `nano` (shipped), a hub id, a diffusers folder, or a single-file checkpoint (`.safetensors`).
    vae: a folder or hub id whose VAE replaces the model's own.
    empty_prompt: what a dropped caption becomes: `zeros` or the encoded `empty` string; none is what the weights say.
    gradient_checkpointing: recompute activations in the backward pass: less memory, about a third slower.
    """
    pipeline = _pipeline(weights)
    if vae is not None:
        pipeline.vae = _part("model.vae", vae, lambda: AutoencoderKL.from_pretrained(vae, dtype=torch.float32))
    recorded = "zeros" if pipeline.config.force_zeros_for_empty_prompt else "empty"
    model = SDXL(**{part: getattr(pipeline, part) for part in _PARTS}, empty_prompt=empty_prompt or recorded)
    if gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    return model


def _pipeline(weights: str) -> StableDiffusionXLPipeline:
    source = str(NANO) if weights == "nano" else os.path.expanduser(weights)
    options = {"dtype": torch.float32, "add_watermarker": False}
    if source.endswith(".safetensors"):
        if not Path(source).is_file():
            raise UserError(f"model.weights={weights}: there is no such file")
        return _part("model.weights", weights, lambda: StableDiffusionXLPipeline.from_single_file(source, **options))
    if source.endswith((".ckpt", ".pt", ".bin")):
        raise UserError(f"model.weights={weights}: a pickle can run code; convert it to .safetensors first")
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        raise UserError(f"model.weights={weights}: the folder has no model_index.json, so it is no diffusers model")
    return _part(
        "model.weights",
        weights,
        lambda: StableDiffusionXLPipeline.from_pretrained(source, use_safetensors=True, **options),
    )


def _part(key: str, name: str, load):
    try:
        return load()
    except (OSError, ValueError) as error:
        if Path(name).exists() or name == "nano":
            raise UserError(f"{key}={name}: cannot be loaded ({_first_line(error)})") from error
        raise UserError(
            f"{key}={name}: not found on this machine and the hub cannot be reached; "
            f"pass {key}=FOLDER or {key}=FILE.safetensors, or connect once so that it is cached"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
