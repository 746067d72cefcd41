"""Our conversion of LoRA files against diffusers' own, for every layer of SDXL that a LoRA can have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor, nn

from sdft.formats.architecture import empty_network
from sdft.formats.lora_file import diffusers_tensors, kohya_tensors, split_key
from sdft.formats.lora_keys import ENCODER_LEAVES, layer_name, layer_of
from sdft.formats.lora_layer import Layer, LoraFile
from sdft.models.load import SDXL_BASE

PARTS = ("unet", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    """SDXL's networks on the meta device."""
    return {part: empty_network(part, SDXL_BASE / part) for part in PARTS}


def lora_of_every_layer(networks: dict[str, nn.Module], dora: bool = False) -> LoraFile:
    """Rank 2 in every layer, narrow, each with its own values and its own alpha."""
    layers: dict[str, Layer] = {}
    for part, network in networks.items():
        for name, module in network.named_modules():
            is_layer = part == "unet" or name.endswith((*ENCODER_LEAVES, "text_projection"))
            if not is_layer or not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            i, ones = float(len(layers)), (1, 1) if isinstance(module, nn.Conv2d) else ()
            tensors = {
                "lora_down.weight": torch.full((2, 3, *ones), i),
                "lora_up.weight": torch.full((4, 2, *ones), -i),
            }
            if dora:
                tensors["dora_scale"] = torch.full((4, 1, *ones), i + 0.5)
            layers[layer_name(part, name)] = Layer(tensors, i + 1)
    assert len(layers) == 794 + 72 + 192 + 1
    return LoraFile(layers, {})


def read_by_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `load_lora_weights` makes of a kohya file's tensors before peft reads them."""
    config = SimpleNamespace(layers_per_block=2)
    read, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(dict(tensors), unet_config=config)
    found = {}
    for part in PARTS:
        own = {name.removeprefix(f"{part}."): t for name, t in read.items() if name.startswith(f"{part}.")}
        if part == "unet":
            own = convert_unet_state_dict_to_peft(own)
        else:
            own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
        found |= {f"{part}.{name}": t for name, t in own.items()}
    return found


def test_our_kohya_file_is_our_diffusers_file_to_diffusers(networks: dict[str, nn.Module]) -> None:
    """Every name and tensor: what diffusers converts from our kohya layout is our diffusers layout."""
    lora = lora_of_every_layer(networks)
    expected, found = dict(diffusers_tensors(lora, None)), read_by_diffusers(dict(kohya_tensors(lora, None)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_diffusers_drops_the_magnitudes_of_a_kohya_dora(networks: dict[str, nn.Module]) -> None:
    """One of the reasons why the conversion is our own; if this fails, diffusers can read them now."""
    lora = lora_of_every_layer(networks, dora=True)
    found = read_by_diffusers(dict(kohya_tensors(lora, None)))
    expected = dict(diffusers_tensors(lora, None))
    assert sum("magnitude" in name for name in expected) == len(lora.layers)
    assert found.keys() == {name for name in expected if "magnitude" not in name}


def test_we_read_the_kohya_files_that_diffusers_writes(networks: dict[str, nn.Module]) -> None:
    """Their names keep diffusers' blocks, and each alpha is the rank: the other reasons."""
    lora = lora_of_every_layer(networks)
    theirs = convert_state_dict_to_kohya(dict(diffusers_tensors(lora, None)))
    ours = dict(kohya_tensors(lora, None))
    assert len(theirs) == len(ours)
    assert "lora_unet_down_blocks_1_attentions_0_proj_in.alpha" in theirs
    assert "lora_unet_input_blocks_4_1_proj_in.alpha" in ours
    for name, tensor in theirs.items():
        module, suffix = split_key(name)
        layer = lora.layers[layer_of(module)]
        if suffix == "alpha":
            assert float(tensor) == layer.rank == 2
        else:
            assert torch.equal(tensor, layer.tensors[suffix])
