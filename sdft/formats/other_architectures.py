"""Recognises single files of other architectures than SDXL by the names of their tensors."""

from __future__ import annotations

from collections.abc import Sequence

from sdft.errors import UserError
from sdft.formats.keys import PREFIXES


def refuse_other_architecture(where: str, names: Sequence[str]) -> None:
    """Raise UserError that names the architecture of a single file if it is not SDXL."""

    def has(*starts: str) -> bool:
        return any(name.startswith(starts) for name in names)

    unet, encoders = PREFIXES["unet"], (PREFIXES["text_encoder"], PREFIXES["text_encoder_2"])
    if has(f"{unet}label_emb.") and all(has(encoder) for encoder in encoders):
        return
    if not names:
        what = "an empty file"
    elif any("lora_" in name for name in names):
        what = "a LoRA, which needs a base model"
    elif has(f"{unet}double_blocks.", "double_blocks.", f"{unet}joint_blocks."):
        what = "a Flux or Stable Diffusion 3 model"
    elif has("conditioner.embedders.0.model."):
        what = "an SDXL refiner, which lacks the first text encoder"
    elif has("cond_stage_model."):
        what = "a Stable Diffusion 1 or 2 model"
    elif has(unet):
        what = "a UNet without SDXL's text encoders"
    else:
        what = f"something else, whose first tensor is {names[0]!r}"
    raise UserError(f"{where}: is {what}; pass a whole SDXL checkpoint")
