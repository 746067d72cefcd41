"""Every LoRA layer of SDXL has kohya's name, one to one: on the real configuration, without weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from torch import nn

from sdft.formats.architecture import empty_network
from sdft.formats.lora_keys import is_convolution, kohya_name, layer_name, layer_of, other_model
from sdft.models.load import SDXL_BASE
from sdft.models.sdxl import SDXL
from sdft.tuning.adapter import Adapter

BY_HAND = {
    "unet/down_blocks.1.attentions.0.proj_in": "lora_unet_input_blocks_4_1_proj_in",
    "unet/down_blocks.1.attentions.1.transformer_blocks.1.attn1.to_k": (
        "lora_unet_input_blocks_5_1_transformer_blocks_1_attn1_to_k"
    ),
    "unet/down_blocks.2.attentions.0.transformer_blocks.9.ff.net.0.proj": (
        "lora_unet_input_blocks_7_1_transformer_blocks_9_ff_net_0_proj"
    ),
    "unet/mid_block.attentions.0.transformer_blocks.3.attn2.to_out.0": (
        "lora_unet_middle_block_1_transformer_blocks_3_attn2_to_out_0"
    ),
    "unet/up_blocks.0.attentions.2.transformer_blocks.5.ff.net.2": (
        "lora_unet_output_blocks_2_1_transformer_blocks_5_ff_net_2"
    ),
    "unet/up_blocks.1.attentions.0.proj_out": "lora_unet_output_blocks_3_1_proj_out",
    "unet/down_blocks.0.resnets.0.conv1": "lora_unet_input_blocks_1_0_in_layers_2",
    "unet/down_blocks.1.resnets.0.conv_shortcut": "lora_unet_input_blocks_4_0_skip_connection",
    "unet/up_blocks.2.resnets.2.conv2": "lora_unet_output_blocks_8_0_out_layers_3",
    "unet/mid_block.resnets.1.time_emb_proj": "lora_unet_middle_block_2_emb_layers_1",
    "unet/down_blocks.1.downsamplers.0.conv": "lora_unet_input_blocks_6_0_op",
    "unet/up_blocks.0.upsamplers.0.conv": "lora_unet_output_blocks_2_2_conv",
    "unet/conv_in": "lora_unet_input_blocks_0_0",
    "text_encoder/text_model.encoder.layers.11.self_attn.q_proj": (
        "lora_te1_text_model_encoder_layers_11_self_attn_q_proj"
    ),
    "text_encoder_2/text_model.encoder.layers.31.mlp.fc2": "lora_te2_text_model_encoder_layers_31_mlp_fc2",
}

BLOCKS = {"input_blocks": {4: 2, 5: 2, 7: 10, 8: 10}, "output_blocks": {0: 10, 1: 10, 2: 10, 3: 2, 4: 2, 5: 2}}
"""Transformer blocks of SDXL's attentions, in LDM's numbering; the middle has 10."""


@pytest.fixture(scope="module")
def sdxl() -> SimpleNamespace:
    """SDXL's networks on the meta device, and what `Adapter` asks of a model."""
    parts = {part: empty_network(part, SDXL_BASE / part) for part in ("unet", "text_encoder", "text_encoder_2")}
    model = SimpleNamespace(**parts, ADAPTER_LAYERS=SDXL.ADAPTER_LAYERS)
    model.get_submodule = nn.ModuleDict(parts).get_submodule
    model.untrained_parameters = lambda part: SDXL.untrained_parameters(model, part)
    return model


def targets(sdxl: SimpleNamespace, part: str) -> list[str]:
    """The layers that a LoRA has by default, encoder 1's unused last one included."""
    chosen = list(Adapter(rank=4, parts=(part,)).configs(sdxl)[part].target_modules)
    if part == "text_encoder":
        chosen += [name.replace("layers.10.", "layers.11.") for name in chosen if "layers.10." in name]
    return [layer_name(part, name) for name in chosen]


def by_kohya() -> set[str]:
    """The names of a LoRA by kohya's networks.lora, put together from what LDM and CLIP call their modules."""
    attentions = {f"{side}_{i}_1": depth for side, sides in BLOCKS.items() for i, depth in sides.items()}
    names = set()
    for attention, depth in (attentions | {"middle_block_1": 10}).items():
        names |= {f"lora_unet_{attention}_proj_{way}" for way in ("in", "out")}
        for block in range(depth):
            inner = [f"attn{i}_to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out_0")]
            inner += ["ff_net_0_proj", "ff_net_2"]
            names |= {f"lora_unet_{attention}_transformer_blocks_{block}_{leaf}" for leaf in inner}
    for prefix, depth in (("lora_te1", 12), ("lora_te2", 32)):
        for i in range(depth):
            leaves = ["self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj"]
            names |= {f"{prefix}_text_model_encoder_layers_{i}_{leaf}" for leaf in [*leaves, "mlp_fc1", "mlp_fc2"]}
    return names


@pytest.mark.parametrize(("layer", "name"), BY_HAND.items())
def test_names_by_hand(layer: str, name: str) -> None:
    assert kohya_name(layer) == name
    assert layer_of(name) == layer


def test_the_default_lora_has_exactly_kohyas_names(sdxl: SimpleNamespace) -> None:
    layers = [targets(sdxl, part) for part in ("unet", "text_encoder", "text_encoder_2")]
    assert [len(found) for found in layers] == [722, 72, 192]
    assert {kohya_name(layer) for found in layers for layer in found} == by_kohya()


def test_every_module_of_the_unet_has_a_name_of_its_own(sdxl: SimpleNamespace) -> None:
    """Also those that only LoCon and its kin reach; read back from LDM's name, diffusers' and peft's."""
    modules = {name: m for name, m in sdxl.unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    names = {kohya_name(f"unet/{module}"): module for module in modules}
    assert len(names) == len(modules) == 794
    for name, module in names.items():
        direct = "lora_unet_" + module.replace(".", "_")
        assert [layer_of(way) for way in (name, direct, f"unet.{module}")] == [f"unet/{module}"] * 3
        assert is_convolution(f"unet/{module}") == isinstance(modules[module], nn.Conv2d)


def test_encoder_1_is_named_alike_whichever_version_of_transformers_named_it() -> None:
    name = "text_encoder/text_model.encoder.layers.0.mlp.fc1"
    assert layer_of("text_encoder.encoder.layers.0.mlp.fc1") == name
    assert layer_of("text_encoder.text_model.encoder.layers.0.mlp.fc1") == name
    assert layer_name("text_encoder", "encoder.layers.0.mlp.fc1") == name


def test_diffusers_reads_the_names_as_the_same_layers(sdxl: SimpleNamespace) -> None:
    """The second witness: diffusers' own reader of kohya files."""
    layers = [layer for part in ("unet", "text_encoder", "text_encoder_2") for layer in targets(sdxl, part)]
    tensors = {f"{kohya_name(layer)}.lora_{way}.weight": layer for layer in layers for way in ("down", "up")}
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(tensors), sdxl.unet.config)
    read, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
    assert len(read) == 2 * 986
    for key, layer in read.items():
        part, module = layer.split("/")
        plain = key.replace(".processor", "").replace("_lora.", ".lora.").replace("to_out.lora", "to_out.0.lora")
        for old, new in {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}.items():
            plain = plain.replace(old, new) if part != "unet" else plain
        assert plain.split(".lora")[0] == f"{part}.{module}"


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "Stable Diffusion 1.5 or 2"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.alpha", "Stable Diffusion 1.5 or 2"),
        ("unet.up_blocks.3.attentions.0.proj_in.lora_A.weight", "Stable Diffusion 1.5 or 2"),
        ("lora_unet_double_blocks_0_img_attn_proj.alpha", "Flux, SD3 or similar"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "Flux, SD3 or similar"),
        ("lora_unet_nonsense.alpha", None),
    ],
)
def test_names_that_sdxl_does_not_have(name: str, model: str | None) -> None:
    assert other_model(name) == model
    with pytest.raises(KeyError):
        layer_of(name.split(".alpha")[0].split(".lora_A")[0])


def test_no_layer_of_sdxl_looks_like_another_models(sdxl: SimpleNamespace) -> None:
    for module, _ in sdxl.unet.named_modules():
        names = [f"unet.{module}", "lora_unet_" + module.replace(".", "_")]
        assert [other_model(name) for name in names] == [None, None]
    assert not any(map(other_model, by_kohya()))
