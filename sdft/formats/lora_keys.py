"""The names of LoRA layers in files of kohya and diffusers: one table for both directions.

A layer is named after the module that it changes, `part/module`, with the key names of diffusers folders on the Hub.
kohya's names have underscores in place of dots, so they can be decoded only by a list of all names.

diffusers' converters are not used, though they agree wherever they convert (tests/formats/test_diffusers_converter.py).
To diffusers, `lora_state_dict` (0.42) drops the magnitudes of DoRA, keeps one alpha for all attention layers of a part
and does not know LoHa and LoKr. From diffusers, `convert_state_dict_to_kohya` writes the rank as every alpha, leaves
DoRA's magnitudes under a name that no program reads, and keeps diffusers' block names instead of LDM's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

from sdft.formats.keys import MAX_LAYERS, PREFIXES, hub_name, mapping_for_weight, unet_modules

PARTS = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
"""The parts that LoRAs change -> the prefix of their layers in kohya's names."""

NORMS, BIAS = {"weight": "w_norm", "bias": "b_norm"}, "diff_b"
"""The suffixes of LyCORIS for the change of a norm, and of ComfyUI for that of another layer's bias."""
VECTORS = {"w_norm": "weight", "b_norm": "bias", "diff": "weight", BIAS: "bias"}
"""Suffixes that may hold the change of a vector -> which weight of its module it is."""

MAX_BLOCKS = 32
"""Of transformer blocks in one attention module; SDXL has up to 10."""

ATTENTION_LEAVES = ("to_q", "to_k", "to_v", "to_out.0")
BLOCK_LEAVES = (*(f"attn{i}.{leaf}" for i in (1, 2) for leaf in ATTENTION_LEAVES), "ff.net.0.proj", "ff.net.2")
ENCODER_LEAVES = (*(f"self_attn.{leaf}_proj" for leaf in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
CONVOLUTIONS = re.compile(r"unet/.*(conv|conv[12]|conv_(shortcut|in|out))")

OTHER_MODELS = {
    r"lora_te_|.*(down_blocks.0.attentions|input_blocks_1_1_|up_blocks.3.attentions)": "Stable Diffusion 1.5 or 2",
    r"transformer\.|lora_transformer_|.*(double|single)_blocks|.*joint_blocks|lora_te3_": "Flux, SD3 or similar",
}
"""Patterns of names that SDXL does not have -> the models that have them."""


def kohya_name(layer: str) -> str:
    """The name in files for kohya, ComfyUI and A1111, with LDM's names in the UNet. Raises KeyError if unknown."""
    return _kohya_names()[layer]


def layer_of(name: str) -> str:
    """The layer of a name in a file: kohya's (with LDM's or diffusers' names after the prefix), or `part.module`.

    Raises KeyError if SDXL has no such layer.
    """
    if name in _layers():
        return _layers()[name]
    part, _, module = name.partition(".")
    layer = layer_name(part, module)
    if layer not in _kohya_names():
        raise KeyError(name)
    return layer


def vector_key(weight: str) -> str:
    """The key in kohya's files of the change of a vector, `part/module.weight` of a norm or `part/module.bias`.

    Raises KeyError for other weights, and for layers that SDXL does not have.
    """
    layer, _, leaf = weight.rpartition(".")
    if layer in _kohya_norms():
        return f"{_kohya_norms()[layer]}.{NORMS[leaf]}"
    if leaf != "bias":
        raise KeyError(weight)
    return f"{kohya_name(layer)}.{BIAS}"


def vector_of(name: str, suffix: str) -> str:
    """The weight whose change a file has under `name` (as in `layer_of`) and a suffix of `VECTORS`.

    Raises KeyError if SDXL has no such layer, or it is no vector.
    """
    part, _, module = name.partition(".")
    layer = _norms().get(name, layer_name(part, module))
    if layer in _kohya_norms():
        return f"{layer}.{VECTORS[suffix]}"
    if suffix != BIAS:
        raise KeyError(name)
    return f"{layer_of(name)}.bias"


def layer_name(part: str, module: str) -> str:
    """The layer of a module, for names of any version of transformers."""
    return f"{part}/{hub_name(part, module)}"


def is_convolution(layer: str) -> bool:
    """Whether the layer's module is a convolution; otherwise it is linear."""
    return CONVOLUTIONS.fullmatch(layer) is not None


def other_model(name: str) -> str | None:
    """The other model that a name belongs to, or None."""
    return next((model for pattern, model in OTHER_MODELS.items() if re.match(pattern, name)), None)


@cache
def _kohya_names() -> dict[str, str]:
    """Every layer that a LoRA of SDXL may have -> kohya's name."""
    names = _named(_unet_layers(), list(_encoder_layers()))
    names["text_encoder_2/text_projection"] = f"{PARTS['text_encoder_2']}text_projection"
    return names


@cache
def _layers() -> dict[str, str]:
    """kohya's names -> layers, including the variant with diffusers' names that some trainers write."""
    direct = {PARTS["unet"] + module.replace(".", "_"): f"unet/{module}" for module in _unet_layers()}
    return direct | {name: layer for layer, name in _kohya_names().items()}


@cache
def _kohya_norms() -> dict[str, str]:
    """Every norm of the UNet and the text encoders -> kohya's name."""
    return _named(_unet_norms(), list(_encoder_norms()))


def _named(unet: Iterable[str], encoders: Sequence[str]) -> dict[str, str]:
    """Modules of the UNet and of both text encoders -> kohya's names."""
    names = {}
    for module in unet:
        single = mapping_for_weight("unet", module).single.removeprefix(PREFIXES["unet"])
        names[f"unet/{module}"] = PARTS["unet"] + single.replace(".", "_")
    for part in ("text_encoder", "text_encoder_2"):
        names |= {f"{part}/{module}": PARTS[part] + module.replace(".", "_") for module in encoders}
    return names


@cache
def _norms() -> dict[str, str]:
    """kohya's names of norms -> norms, including the variant with diffusers' names."""
    direct = {PARTS["unet"] + module.replace(".", "_"): f"unet/{module}" for module in _unet_norms()}
    return direct | {name: layer for layer, name in _kohya_norms().items()}


def _unet_norms() -> Iterator[str]:
    for module in unet_modules():
        if ".attentions." in module:
            yield f"{module}.norm"
            for block in range(MAX_BLOCKS):
                yield from (f"{module}.transformer_blocks.{block}.norm{i}" for i in (1, 2, 3))
        elif "norm" in module:
            yield module


def _encoder_norms() -> Iterator[str]:
    for i in range(MAX_LAYERS):
        yield from (f"text_model.encoder.layers.{i}.layer_norm{j}" for j in (1, 2))
    yield "text_model.final_layer_norm"


def _unet_layers() -> Iterator[str]:
    for module in unet_modules():
        if ".attentions." in module:
            yield from (f"{module}.proj_in", f"{module}.proj_out")
            for block in range(MAX_BLOCKS):
                yield from (f"{module}.transformer_blocks.{block}.{leaf}" for leaf in BLOCK_LEAVES)
        elif "norm" not in module:
            yield module


def _encoder_layers() -> Iterator[str]:
    for i in range(MAX_LAYERS):
        yield from (f"text_model.encoder.layers.{i}.{leaf}" for leaf in ENCODER_LEAVES)
