"""A model on disk that is SDXL by its names and has only some of its weights: merges of it take milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdft.formats.diffusers_folder import FILES
from sdft.formats.model_checkpoint import open_checkpoint

LONG = "text_encoder/text_model.embeddings.token_embedding.weight"
"""More numbers than are computed at a time."""
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
ATTENTION = "text_encoder_2/text_model.encoder.layers.0.self_attn"
SHAPES = {
    "unet/conv_in.weight": (6, 4, 3, 3),
    "unet/conv_in.bias": (6,),
    "unet/add_embedding.linear_1.weight": (8, 12),
    f"unet/{LAYER}.weight": (12, 8),
    "unet/up_blocks.0.attentions.1.proj_in.weight": (8, 8),
    "unet/conv_out.weight": (4, 6, 3, 3),
    LONG: (2100, 512),
    **{f"{ATTENTION}.{x}_proj.weight": (8, 8) for x in "qkv"},
    "text_encoder_2/text_projection.weight": (8, 8),
    "vae/encoder.mid_block.attentions.0.to_q.weight": (4, 4),
    "vae/quant_conv.weight": (8, 8, 1, 1),
}


def tensors_of(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def write_model(folder: Path, tensors: dict[str, Tensor], prediction: str = "epsilon") -> Path:
    """A folder with these weights, by `part/name`."""
    for part in (*FILES, "scheduler", "tokenizer", "tokenizer_2"):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": prediction}))
    for part, file in FILES.items():
        held = {name.split("/", 1)[1]: tensor for name, tensor in tensors.items() if name.startswith(f"{part}/")}
        save_file(held, folder / part / file, metadata={"format": "pt"})
    return folder


def read(path: Path) -> dict[str, Tensor]:
    """Every weight of a model in any format, by `part/name`."""
    checkpoint = open_checkpoint("in", path)
    with checkpoint.opened() as one:
        return {name: one(name).clone() for name in checkpoint.weights}
