"""The key names of SDXL's weights in diffusers folders and in single files (LDM): one table for both directions.

A weight is named `part/name` (`unet/conv_in.bias`), with the key names of diffusers folders on the Hub. Knows names and
shapes; must not depend on files or values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

PREFIXES = {
    "unet": "model.diffusion_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
    "vae": "first_stage_model.",
}
"""The key prefix of each part in a single file."""

NUM_LEVELS, NUM_RESNETS = 3, 2
"""Of the UNet: SDXL's topology; widths and numbers of transformer blocks may differ."""
MAX_LAYERS = 64
"""Of a text encoder; SDXL's have 12 and 32."""

Layout = Literal["same", "transposed", "conv"]


@dataclass(frozen=True)
class KeyMapping:
    """One tensor of a single file, and the weights of a folder with the same values.

    Several weights are concatenated along the first axis. layout: `transposed` swaps the axes; `conv` is a 1x1
    convolution that is a linear layer in diffusers.
    """

    single: str
    part: str
    names: tuple[str, ...]
    layout: Layout = "same"

    @property
    def weights(self) -> tuple[str, ...]:
        """`part/name` of each."""
        return tuple(f"{self.part}/{name}" for name in self.names)

    def folder_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of each weight, if the single file's tensor has `shape`."""
        if self.layout == "transposed":
            return tuple(reversed(shape))
        if self.layout == "conv":
            return tuple(shape[:2])
        return (shape[0] // len(self.names), *shape[1:]) if len(self.names) > 1 else tuple(shape)

    def single_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the single file's tensor, if each weight has `shape`."""
        if self.layout == "transposed":
            return tuple(reversed(shape))
        if self.layout == "conv":
            return (*shape, 1, 1)
        return (shape[0] * len(self.names), *shape[1:]) if len(self.names) > 1 else tuple(shape)

    def to_single(self, tensors: Sequence[Tensor]) -> Tensor:
        """The single file's tensor, from all the weights."""
        if self.layout == "transposed":
            return tensors[0].T
        if self.layout == "conv":
            return tensors[0][:, :, None, None]
        return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]

    def to_folder(self, tensor: Tensor, index: int) -> Tensor:
        """Weight number `index`, as a view of the single file's tensor."""
        if self.layout == "transposed":
            return tensor.T
        if self.layout == "conv":
            return tensor[:, :, 0, 0]
        return tensor.chunk(len(self.names))[index] if len(self.names) > 1 else tensor


def mapping_for_weight(part: str, name: str, num_vae_levels: int = 4) -> KeyMapping:
    """The mapping of a weight of a folder. Raises KeyError for a weight that SDXL does not have."""
    if part == "text_encoder_2":
        if name == "text_projection.weight":
            return KeyMapping(f"{PREFIXES[part]}text_projection", part, (name,), "transposed")
        before, _, after = name.partition(".self_attn.")
        if after.split(".")[0] in ("q_proj", "k_proj", "v_proj"):
            leaf = after.split(".")[1]
            single = f"{PREFIXES[part]}{_renamed(before, _encoder_2())}.attn.in_proj_{leaf}"
            return KeyMapping(single, part, tuple(f"{before}.self_attn.{x}_proj.{leaf}" for x in "qkv"))
    table = _table(part, num_vae_levels)
    layout: Layout = "conv" if part == "vae" and ".attentions." in name and _is_matrix(name) else "same"
    return KeyMapping(PREFIXES[part] + _renamed(name, table), part, (name,), layout)


def mapping_for_single_key(single: str, num_vae_levels: int = 4) -> KeyMapping:
    """The mapping of a tensor of a single file. Raises KeyError for one that SDXL does not have."""
    part = next((part for part, prefix in PREFIXES.items() if single.startswith(prefix)), None)
    if part is None:
        raise KeyError(single)
    inner = single.removeprefix(PREFIXES[part])
    if part == "text_encoder_2":
        if inner == "text_projection":
            return KeyMapping(single, part, ("text_projection.weight",), "transposed")
        before, found, leaf = inner.partition(".attn.in_proj_")
        if found:
            layer = _renamed(before, _reversed(part, num_vae_levels))
            return KeyMapping(single, part, tuple(f"{layer}.self_attn.{x}_proj.{leaf}" for x in "qkv"))
    name = _renamed(inner, _reversed(part, num_vae_levels))
    return mapping_for_weight(part, name, num_vae_levels)


def hub_name(part: str, name: str) -> str:
    """A parameter's key name in files on the Hub: transformers 5 dropped `text_model.` from those of text encoder 1."""
    return f"text_model.{name}" if part == "text_encoder" and not name.startswith("text_model.") else name


def _is_matrix(name: str) -> bool:
    return name.endswith(".weight") and "group_norm" not in name


def _renamed(name: str, table: dict[str, str]) -> str:
    """The name with its longest prefix in the table replaced."""
    head = name
    while head:
        if head in table:
            return table[head] + name[len(head) :]
        head = head.rpartition(".")[0]
    raise KeyError(name)


@cache
def _table(part: str, num_vae_levels: int) -> dict[str, str]:
    """diffusers' modules -> the single file's."""
    if part == "text_encoder":
        return {"text_model": "text_model"}
    if part == "text_encoder_2":
        return _encoder_2()
    return dict(_unet() if part == "unet" else _vae(num_vae_levels))


@cache
def _reversed(part: str, num_vae_levels: int) -> dict[str, str]:
    return {single: name for name, single in _table(part, num_vae_levels).items()}


def unet_modules() -> dict[str, str]:
    """The UNet's modules in diffusers -> in single files, from which the layer names of kohya's LoRAs derive."""
    return _table("unet", 0)


def _unet() -> Iterator[tuple[str, str]]:
    yield from {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.attentions.0": "middle_block.1",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }.items()
    for i in range(2):
        yield from _resnet(f"mid_block.resnets.{i}", f"middle_block.{2 * i}")
    for level in range(NUM_LEVELS):
        for i in range(NUM_RESNETS):
            block = f"input_blocks.{(NUM_RESNETS + 1) * level + i + 1}"
            yield from _resnet(f"down_blocks.{level}.resnets.{i}", f"{block}.0")
            if level > 0:
                yield f"down_blocks.{level}.attentions.{i}", f"{block}.1"
        for i in range(NUM_RESNETS + 1):
            block = f"output_blocks.{(NUM_RESNETS + 1) * level + i}"
            yield from _resnet(f"up_blocks.{level}.resnets.{i}", f"{block}.0")
            if level < NUM_LEVELS - 1:
                yield f"up_blocks.{level}.attentions.{i}", f"{block}.1"
        if level < NUM_LEVELS - 1:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{(NUM_RESNETS + 1) * (level + 1)}.0.op"
            yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{(NUM_RESNETS + 1) * level + 2}.2.conv"


def _resnet(name: str, single: str) -> Iterator[tuple[str, str]]:
    leaves = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return ((f"{name}.{leaf}", f"{single}.{other}") for leaf, other in leaves.items())


@cache
def _encoder_2() -> dict[str, str]:
    table = {
        "text_model.embeddings.token_embedding": "token_embedding",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
    }
    leaves = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    for i in range(MAX_LAYERS):
        layer, block = f"text_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        table[layer] = block
        table |= {f"{layer}.{leaf}": f"{block}.{other}" for leaf, other in leaves.items()}
    return table


def _vae(num_levels: int) -> Iterator[tuple[str, str]]:
    yield from ((name, name) for name in ("quant_conv", "post_quant_conv"))
    for side in ("encoder", "decoder"):
        yield from ((f"{side}.{name}", f"{side}.{name}") for name in ("conv_in", "conv_out"))
        yield f"{side}.conv_norm_out", f"{side}.norm_out"
        for i in range(2):
            yield f"{side}.mid_block.resnets.{i}", f"{side}.mid.block_{i + 1}"
        attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
        for leaf, other in attention.items():
            yield f"{side}.mid_block.attentions.0.{leaf}", f"{side}.mid.attn_1.{other}"
    for level in range(num_levels):
        mirrored = num_levels - 1 - level
        for i in range(NUM_RESNETS + 1):
            for name, other in (
                (f"encoder.down_blocks.{level}", f"encoder.down.{level}"),
                (f"decoder.up_blocks.{level}", f"decoder.up.{mirrored}"),
            ):
                yield f"{name}.resnets.{i}", f"{other}.block.{i}"
                yield f"{name}.resnets.{i}.conv_shortcut", f"{other}.block.{i}.nin_shortcut"
        yield f"encoder.down_blocks.{level}.downsamplers.0.conv", f"encoder.down.{level}.downsample.conv"
        yield f"decoder.up_blocks.{level}.upsamplers.0.conv", f"decoder.up.{mirrored}.upsample.conv"
