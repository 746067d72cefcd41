"""The key table on the real SDXL configuration, without weights, and by hand."""

from __future__ import annotations

import pytest
import torch
from tiny import build_tiny_model

from sdft.formats.architecture import PARTS, empty_network, parameter_names
from sdft.formats.keys import KeyMapping, hub_name, mapping_for_single_key, mapping_for_weight
from sdft.models.load import SDXL_BASE

UNET, ENCODER_1, ENCODER_2, VAE = (
    "model.diffusion_model.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
    "first_stage_model.",
)
SIZES = {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "vae": 83_653_863}
BY_HAND = [
    ("unet", "conv_in.weight", f"{UNET}input_blocks.0.0.weight"),
    ("unet", "time_embedding.linear_2.bias", f"{UNET}time_embed.2.bias"),
    ("unet", "add_embedding.linear_1.weight", f"{UNET}label_emb.0.0.weight"),
    ("unet", "down_blocks.0.resnets.1.conv2.weight", f"{UNET}input_blocks.2.0.out_layers.3.weight"),
    ("unet", "down_blocks.0.downsamplers.0.conv.weight", f"{UNET}input_blocks.3.0.op.weight"),
    ("unet", "down_blocks.1.resnets.0.conv_shortcut.bias", f"{UNET}input_blocks.4.0.skip_connection.bias"),
    (
        "unet",
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj.weight",
        f"{UNET}input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight",
    ),
    ("unet", "mid_block.resnets.1.time_emb_proj.weight", f"{UNET}middle_block.2.emb_layers.1.weight"),
    ("unet", "up_blocks.0.attentions.2.proj_in.weight", f"{UNET}output_blocks.2.1.proj_in.weight"),
    ("unet", "up_blocks.1.upsamplers.0.conv.bias", f"{UNET}output_blocks.5.2.conv.bias"),
    ("unet", "up_blocks.2.resnets.2.norm1.weight", f"{UNET}output_blocks.8.0.in_layers.0.weight"),
    ("unet", "conv_out.weight", f"{UNET}out.2.weight"),
    (
        "text_encoder",
        "text_model.encoder.layers.11.mlp.fc1.bias",
        f"{ENCODER_1}text_model.encoder.layers.11.mlp.fc1.bias",
    ),
    (
        "text_encoder_2",
        "text_model.encoder.layers.31.mlp.fc2.weight",
        f"{ENCODER_2}transformer.resblocks.31.mlp.c_proj.weight",
    ),
    ("text_encoder_2", "text_model.embeddings.position_embedding.weight", f"{ENCODER_2}positional_embedding"),
    ("text_encoder_2", "text_model.final_layer_norm.bias", f"{ENCODER_2}ln_final.bias"),
    ("text_encoder_2", "text_projection.weight", f"{ENCODER_2}text_projection"),
    ("vae", "decoder.up_blocks.0.upsamplers.0.conv.weight", f"{VAE}decoder.up.3.upsample.conv.weight"),
    ("vae", "encoder.down_blocks.1.resnets.0.conv_shortcut.weight", f"{VAE}encoder.down.1.block.0.nin_shortcut.weight"),
    ("vae", "encoder.mid_block.attentions.0.to_out.0.weight", f"{VAE}encoder.mid.attn_1.proj_out.weight"),
    ("vae", "decoder.mid_block.attentions.0.group_norm.weight", f"{VAE}decoder.mid.attn_1.norm.weight"),
]


@pytest.fixture(scope="module")
def sdxl() -> dict[str, torch.nn.Module]:
    return {part: empty_network(part, SDXL_BASE / part) for part in PARTS}


@pytest.mark.parametrize("part", PARTS)
def test_the_shipped_configs_are_sdxls(part: str, sdxl) -> None:
    assert sum(p.numel() for p in sdxl[part].parameters()) == SIZES[part]
    assert all(p.device.type == "meta" for p in sdxl[part].parameters())


@pytest.mark.parametrize("part", PARTS)
def test_every_weight_of_sdxl_has_one_place_and_comes_back_from_it(part: str, sdxl) -> None:
    places: dict[str, KeyMapping] = {}
    for weight in parameter_names(part, sdxl[part]):
        name = weight.split("/", 1)[1]
        place = mapping_for_weight(part, name)
        assert mapping_for_single_key(place.single) == place
        assert name in place.names
        assert places.setdefault(place.single, place) == place
    mapped = [weight for place in places.values() for weight in place.weights]
    assert sorted(mapped) == sorted(parameter_names(part, sdxl[part]))
    assert len(places) == {"unet": 1680, "text_encoder": 196, "text_encoder_2": 389, "vae": 248}[part]


def test_a_vae_of_three_levels() -> None:
    """SDXL's and nano's have four."""
    for weight in build_tiny_model().vae.state_dict():
        assert mapping_for_single_key(mapping_for_weight("vae", weight, 3).single, 3).names == (weight,)
    deepest = mapping_for_weight("vae", "decoder.up_blocks.0.resnets.0.conv1.bias", 3)
    assert deepest.single == f"{VAE}decoder.up.2.block.0.conv1.bias"


@pytest.mark.parametrize(("part", "name", "single"), BY_HAND, ids=[name for _, name, _ in BY_HAND])
def test_names_written_by_hand(part: str, name: str, single: str) -> None:
    assert mapping_for_weight(part, name).single == single
    assert mapping_for_single_key(single).names == (name,)


def test_queries_keys_and_values_are_stacked_in_this_order() -> None:
    place = mapping_for_single_key(f"{ENCODER_2}transformer.resblocks.3.attn.in_proj_weight")
    layer = "text_model.encoder.layers.3.self_attn"
    assert place.names == (f"{layer}.q_proj.weight", f"{layer}.k_proj.weight", f"{layer}.v_proj.weight")
    assert place.folder_shape((3840, 1280)) == (1280, 1280)
    assert place.single_shape((1280, 1280)) == (3840, 1280)
    stacked = torch.arange(12.0).view(6, 2)
    parts = [place.to_folder(stacked, index) for index in range(3)]
    assert parts[1].tolist() == [[4, 5], [6, 7]]
    assert torch.equal(place.to_single(parts), stacked)


def test_the_projection_is_transposed_and_attention_of_the_vae_is_a_convolution() -> None:
    projection = mapping_for_weight("text_encoder_2", "text_projection.weight")
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert projection.to_single([matrix]).tolist() == [[1, 3], [2, 4]]
    assert projection.to_folder(projection.to_single([matrix]), 0).tolist() == matrix.tolist()
    attention = mapping_for_weight("vae", "encoder.mid_block.attentions.0.to_q.weight")
    assert attention.single_shape((512, 512)) == (512, 512, 1, 1)
    assert attention.to_single([matrix]).shape == (2, 2, 1, 1)
    assert attention.to_folder(attention.to_single([matrix]), 0).tolist() == matrix.tolist()
    assert mapping_for_weight("vae", "encoder.mid_block.attentions.0.to_q.bias").layout == "same"


def test_what_sdxl_does_not_have_has_no_place() -> None:
    for single in ("model_ema.decay", f"{UNET}input_blocks.12.0.in_layers.0.weight", f"{VAE}loss.logvar"):
        with pytest.raises(KeyError):
            mapping_for_single_key(single)
    with pytest.raises(KeyError):
        mapping_for_weight("unet", "down_blocks.3.resnets.0.conv1.weight")


def test_encoder_1_has_one_name_in_files_whatever_transformers_calls_it() -> None:
    assert hub_name("text_encoder", "final_layer_norm.bias") == "text_model.final_layer_norm.bias"
    assert hub_name("text_encoder", "text_model.final_layer_norm.bias") == "text_model.final_layer_norm.bias"
    assert hub_name("unet", "conv_in.bias") == "conv_in.bias"
