"""Which layers of SDXL get adapters, and which layers never receive a gradient."""

from __future__ import annotations

from torch import nn

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
ATTENTION_TARGETS = UNET_TARGETS[:4]
CONV_TARGETS = ("conv1", "conv2", "downsamplers.0.conv", "upsamplers.0.conv")
ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
TARGETS = {
    "unet": {"attention": ATTENTION_TARGETS, "all": UNET_TARGETS, "conv": UNET_TARGETS + CONV_TARGETS},
    "encoder": {"attention": ENCODER_TARGETS[:4], "all": ENCODER_TARGETS, "conv": ENCODER_TARGETS},
}


def unused_layer(part: str, module: nn.Module) -> str | None:
    """Encoder 1's last layer: its penultimate output is the context, so nothing reaches that layer."""
    return f"encoder.layers.{module.config.num_hidden_layers - 1}" if part == "text_encoder" else None


def freeze_unused_layers(part: str, module: nn.Module) -> None:
    """Take out of training what gets no gradient."""
    unused = unused_layer(part, module)
    for name, parameter in module.named_parameters():
        if unused and (f"{unused}." in name or "final_layer_norm" in name):
            parameter.requires_grad_(False)
