"""The attention processors of the UNet, and errors where the chosen one cannot run."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import nn

from sdft.errors import UserError

Attention = Literal["sdpa", "xformers", "eager", "sliced"]
REMEDY = "set model.attention=sdpa, which runs everywhere"


def set_attention(unet: UNet2DConditionModel, attention: Attention) -> None:
    """Set the processor of every attention layer. Raises UserError if it is not installed or cannot run here."""
    if attention == "xformers":
        refuse_without_xformers()
        unet.set_attn_processor(XFormersAttnProcessor())
    elif attention == "sliced":
        unet.set_attention_slice("auto")
    else:
        unet.set_attn_processor(AttnProcessor2_0() if attention == "sdpa" else AttnProcessor())


def refuse_without_xformers() -> None:
    """Raise UserError if xformers is not installed, has no GPU, or does not run with this torch."""
    if importlib.util.find_spec("xformers") is None:
        raise UserError(
            "model.attention=xformers: xformers is not installed; install it with pip install 'sdft[xformers]' "
            f"-c constraints.txt on a machine with an NVIDIA GPU, or {REMEDY}"
        )
    if not torch.cuda.is_available():
        raise UserError(f"model.attention=xformers: xformers has no CPU kernels and no GPU is found here; {REMEDY}")
    try:
        from xformers.ops import memory_efficient_attention

        x = torch.randn(1, 8, 1, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        memory_efficient_attention(x, x, x).sum().backward()
    except (ImportError, NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"model.attention=xformers: the installed wheel does not run with torch {torch.__version__} on this GPU "
            f"({str(error).strip().splitlines()[0]}); install the wheel built for this torch, or {REMEDY}"
        ) from error


def refuse_device(denoiser: nn.Module, device: torch.device) -> None:
    """Raise UserError if the chosen attention has no kernels for the device of the run."""
    if not isinstance(denoiser, UNet2DConditionModel):
        return
    chosen = denoiser.attn_processors.values()
    if device.type != "cuda" and any(isinstance(processor, XFormersAttnProcessor) for processor in chosen):
        raise UserError(f"model.attention=xformers needs an NVIDIA GPU, and this run is on {device.type}; {REMEDY}")
