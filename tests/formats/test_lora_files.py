"""LoRA files: what is in them, that nothing is lost between the layouts, and every way to be refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdft.errors import UserError
from sdft.formats.adapter import lora_from_model, write_lora
from sdft.formats.lora_file import is_lora, read_lora, write_lora_file
from sdft.formats.lora_layer import Layer, LoraFile, network_metadata
from sdft.models.sdxl import SDXL
from sdft.tuning.adapter import Adapter
from sdft.tuning.parameters import trainable_parameters

ALL_PARTS = ("unet", "text_encoder", "text_encoder_2")
ALPHA = 7.0
QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA_QUERY = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"

TUNINGS = {
    "lora": {},
    "lora_te": {"parts": ALL_PARTS},
    "locon": {"layers": "conv"},
    "dora": {"method": "dora", "layers": "conv"},
    "dora_te": {"method": "dora", "parts": ALL_PARTS},
    "loha": {"method": "loha", "layers": "conv"},
    "lokr": {"method": "lokr", "layers": "conv"},
}


@pytest.fixture(scope="module")
def trained(tiny_model: Callable[..., SDXL]) -> Callable[[str], SDXL]:
    """The tiny model with the adapters of a tuning, every one of them filled with numbers."""
    made: dict[str, SDXL] = {}

    def build(name: str) -> SDXL:
        if name not in made:
            made[name] = tiny_model()
            Adapter(rank=3, alpha=ALPHA, **TUNINGS[name]).attach(made[name])
            g = torch.Generator().manual_seed(8)
            for _, p in trainable_parameters(made[name]):
                p.data.copy_(torch.randn(p.shape, generator=g))
        return made[name]

    return build


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_what_diffusers_cannot_hold_is_refused(name: str, trained: Callable, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"diffusers cannot represent {name} .*write the kohya layout"):
        write_lora(trained(name), tmp_path / "lora.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_tensors_of_both_layouts_are_named_as_other_programs_name_them(trained: Callable, tmp_path: Path) -> None:
    write_lora(trained("dora"), tmp_path / "kohya.safetensors", layout="kohya", metadata={"ss_epoch": "3"})
    write_lora(trained("dora"), tmp_path / "diffusers.safetensors")
    kohya, diffusers = (load_file(tmp_path / f"{layout}.safetensors") for layout in ("kohya", "diffusers"))
    conv, its_kohya = "unet.down_blocks.0.resnets.0.conv1", "lora_unet_input_blocks_1_0_in_layers_2"
    shapes = {
        f"{KOHYA_QUERY}.lora_down.weight": (3, 24),
        f"{KOHYA_QUERY}.lora_up.weight": (24, 3),
        f"{KOHYA_QUERY}.dora_scale": (24, 1),
        f"{KOHYA_QUERY}.alpha": (),
        f"{its_kohya}.lora_down.weight": (3, 16, 3, 3),
        f"{its_kohya}.lora_up.weight": (16, 3, 1, 1),
        f"{its_kohya}.dora_scale": (16, 1, 1, 1),
    }
    assert {name: tuple(kohya[name].shape) for name in shapes} == shapes
    shapes = {
        f"unet.{QUERY}.lora_A.weight": (3, 24),
        f"unet.{QUERY}.lora_B.weight": (24, 3),
        f"unet.{QUERY}.lora_magnitude_vector": (24,),
        f"{conv}.lora_magnitude_vector": (1, 16, 1, 1),
    }
    assert {name: tuple(diffusers[name].shape) for name in shapes} == shapes
    assert {float(tensor) for name, tensor in kohya.items() if name.endswith(".alpha")} == {ALPHA}
    assert len(kohya) == len(diffusers) // 3 * 4
    with safe_open(tmp_path / "kohya.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "ss_epoch": "3"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["lora_te", "locon", "dora", "dora_te"])
@pytest.mark.parametrize("start", ["kohya", "diffusers"])
def test_there_and_back_is_bit_identical(name: str, dtype, start: str, trained: Callable, tmp_path: Path) -> None:
    layouts = ("kohya", "diffusers", "kohya") if start == "kohya" else ("diffusers", "kohya", "diffusers")
    lora = uneven(lora_from_model(trained(name)))
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    write_lora_file(lora, paths[0], layouts[0], dtype, {"note": "before"})
    for source, target, layout in zip(paths, paths[1:], layouts[1:], strict=False):
        read = read_lora(source, "in")
        write_lora_file(read, target, layout, metadata=read.metadata)
    first, last = load_file(paths[0]), load_file(paths[2])
    assert first.keys() == last.keys()
    for key, tensor in first.items():
        assert tensor.dtype == last[key].dtype, key
        assert torch.equal(tensor, last[key]), key
    with safe_open(paths[0], "pt") as one, safe_open(paths[2], "pt") as two:
        assert one.metadata() == two.metadata()


def uneven(lora: LoraFile) -> LoraFile:
    """The same with other alphas and ranks in some layers."""
    layers = dict(lora.layers)
    for i, (name, layer) in enumerate(list(layers.items())[:20]):
        tensors = dict(layer.tensors)
        if i % 2:
            tensors["lora_down.weight"] = tensors["lora_down.weight"][:2]
            tensors["lora_up.weight"] = tensors["lora_up.weight"][:, :2]
        layers[name] = Layer(tensors, 0.5 + i)
    return LoraFile(layers)


def test_an_alpha_that_the_dtype_cannot_hold_stays_true(trained: Callable, tmp_path: Path) -> None:
    layers = {name: Layer(layer.tensors, 7.3) for name, layer in lora_from_model(trained("lora")).layers.items()}
    for layout in ("kohya", "diffusers"):
        write_lora_file(LoraFile(layers), tmp_path / "lora.safetensors", layout, torch.bfloat16)
        read = read_lora(tmp_path / "lora.safetensors", "in").layers
        assert [layer.alpha for layer in read.values()] == pytest.approx([7.3] * len(layers), rel=1e-7)


def test_alphas_of_diffusers_files(tmp_path: Path) -> None:
    """From the metadata; a pattern before the rest; a rank-stabilised alpha as the plain one; else the rank."""
    file = tmp_path / "lora.safetensors"
    tensors = {f"unet.{QUERY[:-1]}{x}.lora_{y}.weight": torch.ones(4, 4) for x in "qk" for y in "AB"}
    config = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_k": 2}}
    for metadata, alphas in [
        ({}, [4.0, 4.0]),
        ({"lora_adapter_metadata": json.dumps(config)}, [8.0, 2.0]),
        ({"lora_adapter_metadata": json.dumps(config | {"unet.use_rslora": True})}, [16.0, 4.0]),
    ]:
        save_file(tensors, file, metadata)
        read = read_lora(file, "in").layers
        assert [read[f"unet/{QUERY[:-1]}{x}"].alpha for x in "qk"] == alphas


def test_older_names_are_read(tmp_path: Path) -> None:
    """Of diffusers' scripts, before and after they knew peft; of kohya's without LDM's names; linears as 1x1 convs."""
    down, up, file = torch.ones(2, 96), torch.ones(96, 2), tmp_path / "lora.safetensors"
    attention = QUERY.removesuffix(".to_q")
    for names in [
        (f"unet.{attention}.processor.to_q_lora.down.weight", f"unet.{attention}.processor.to_q_lora.up.weight"),
        (f"unet.{QUERY}.lora.down.weight", f"unet.{QUERY}.lora.up.weight"),
        (f"lora_unet_{QUERY.replace('.', '_')}.lora_down.weight", f"{KOHYA_QUERY}.lora_up.weight"),
    ]:
        save_file({names[0]: down, names[1]: up[:, :, None, None]}, file)
        ((layer, found),) = read_lora(file, "in").layers.items()
        assert layer == f"unet/{QUERY}"
        assert torch.equal(found.tensors["lora_up.weight"], up)


def test_a_lokr_of_two_whole_matrices_is_not_scaled_in_files(trained: Callable, tmp_path: Path) -> None:
    """LyCORIS and ComfyUI take it as it is, whatever alpha is; peft does not."""
    live = trained("lokr")
    write_lora(live, tmp_path / "lora.safetensors", torch.float32, "kohya")
    tensors = load_file(tmp_path / "lora.safetensors")
    adapted = live.unet.get_submodule(QUERY)
    assert "default" in adapted.lokr_w2
    torch.testing.assert_close(tensors[f"{KOHYA_QUERY}.lokr_w1"], adapted.lokr_w1["default"] * ALPHA / 3)
    assert torch.equal(tensors[f"{KOHYA_QUERY}.lokr_w2"], adapted.lokr_w2["default"])


def test_what_kohyas_metadata_say(trained: Callable) -> None:
    def network(lora: LoraFile) -> list[str]:
        return [network_metadata(lora)[f"ss_network_{what}"] for what in ("module", "dim", "alpha")]

    assert network(lora_from_model(trained("locon"))) == ["networks.lora", "3", "7"]
    assert network(lora_from_model(trained("loha"))) == ["lycoris.kohya", "3", "7"]
    assert network(uneven(lora_from_model(trained("lora")))) == ["networks.lora", "Dynamic", "Dynamic"]


def test_a_file_has_the_mode_of_the_umask_and_no_temporary_file_remains(trained: Callable, tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        write_lora(trained("lora"), tmp_path / "new" / "lora.safetensors")
    finally:
        os.umask(umask)
    (file,) = (tmp_path / "new").iterdir()
    assert file.stat().st_mode & 0o777 == 0o644


DOWN, UP = f"{KOHYA_QUERY}.lora_down.weight", f"{KOHYA_QUERY}.lora_up.weight"
NAMED = "unet/down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
BAD = {
    "no LoRA": ({"w": (2, 2)}, "is not a LoRA; none of its 1 tensors"),
    "no LoRA but an alpha": ({"x.alpha": ()}, "is not a LoRA"),
    "SD 1.5, encoder": (
        {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 4)},
        "is a LoRA for Stable Diffusion 1.5 or 2 .*it does not fit SDXL",
    ),
    "SD 1.5, UNet": (
        {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (2, 4)},
        "is a LoRA for Stable Diffusion 1.5 or 2",
    ),
    "Flux": ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (2, 4)}, "is a LoRA for Flux"),
    "unknown modules": (
        {"lora_unet_what.lora_down.weight": (2, 4), "unet.nowhere.to_q.lora_A.weight": (2, 4), DOWN: (2, 4)},
        r"has 2 tensors that cannot be read: 2 layers that SDXL does not have \(lora_unet_what.lora_down.weight, "
        r"unet.nowhere.to_q.lora_A.weight\). python -m sdft.formats skip_unknown=true writes a file of the others$",
    ),
    "an unknown tensor": (
        {DOWN: (2, 4), UP: (4, 2), f"{KOHYA_QUERY}.diff": (4, 4)},
        r"has 1 tensors that cannot be read: 1 whole weights \(diff\) of LyCORIS "
        rf"\({KOHYA_QUERY}.diff\). python -m sdft.formats skip_unknown",
    ),
    "no up": ({DOWN: (2, 4)}, f"damaged in 1 of its 1 layers: {NAMED} has no lora_up.weight$"),
    "no down": ({UP: (4, 2)}, f"{NAMED} has no lora_down.weight$"),
    "half a LoHa": ({f"{KOHYA_QUERY}.hada_w1_a": (4, 2)}, "has no hada_w1_b and no hada_w2_a and no hada_w2_b$"),
    "half a LoKr": ({f"{KOHYA_QUERY}.lokr_w1": (4, 2)}, "has no lokr_w2_a and no lokr_w2_b$"),
    "ranks differ": ({DOWN: (2, 4), UP: (4, 3)}, r"contradict each other \(lora_down.weight \[2, 4\], lora_up"),
    "two alphas": ({DOWN: (2, 4), UP: (4, 2), f"{KOHYA_QUERY}.alpha": (2,)}, "has an alpha of 2 numbers$"),
    "magnitudes of columns": (
        {DOWN: (2, 4), UP: (6, 2), f"{KOHYA_QUERY}.dora_scale": (1, 4)},
        r"is a DoRA with norms of columns \(dora_scale \[1, in\]\), and norms of rows can be read$",
    ),
    "DoRA on a LoHa": (
        {f"{KOHYA_QUERY}.hada_w{i}_{x}": (4, 4) for i in (1, 2) for x in "ab"} | {f"{KOHYA_QUERY}.dora_scale": (4, 1)},
        "has dora_scale, which does not belong to its other tensors",
    ),
    "blocks that are not square": ({f"{KOHYA_QUERY}.oft_blocks": (8, 3, 2)}, r"contradict each other \(oft_blocks \[8"),
    "one block": ({f"{KOHYA_QUERY}.oft_blocks": (4, 4)}, r"contradict each other \(oft_blocks \[4, 4\]\)"),
    "odd blocks of a BOFT": ({f"{KOHYA_QUERY}.oft_blocks": (2, 4, 3, 3)}, "contradict each other"),
    "too many rotations": ({f"{KOHYA_QUERY}.oft_blocks": (4, 4, 2, 2)}, "contradict each other"),
    "a factor for other rows": (
        {f"{KOHYA_QUERY}.oft_blocks": (4, 2, 2), f"{KOHYA_QUERY}.rescale": (6, 1)},
        r"contradict each other \(oft_blocks \[4, 2, 2\], rescale \[6, 1\]\)",
    ),
    "a rotation and a LoRA": (
        {f"{KOHYA_QUERY}.oft_blocks": (4, 2, 2), DOWN: (2, 8), UP: (8, 2)},
        "has oft_blocks, which does not belong to its other tensors",
    ),
    "a norm of two dimensions": (
        {"lora_unet_input_blocks_1_0_in_layers_0.w_norm": (4, 1)},
        r"damaged in 1 of its 1 layers: unet/down_blocks.0.resnets.0.norm1.weight has a change of \[4, 1\]$",
    ),
    "a norm twice": (
        {f"lora_unet_{name}.b_norm": (4,) for name in ("out_0", "conv_norm_out")},
        "has bias of unet/conv_norm_out twice, once as lora_unet_",
    ),
    "twice": ({DOWN: (2, 4), UP: (4, 2), f"unet.{QUERY}.lora_A.weight": (2, 4)}, "has lora_down.weight of .* twice"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gets_one_clear_line(name: str, tmp_path: Path) -> None:
    shapes, message = BAD[name]
    save_file({key: torch.ones(shape) for key, shape in shapes.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        read_lora(tmp_path / "bad.safetensors", "in=bad.safetensors")
    assert str(caught.value).startswith("in=bad.safetensors: ")
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(trained: Callable, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    write_lora(trained("lora"), path)
    whole = path.read_bytes()
    for length in (0, 5, 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"^in=x: .* is truncated or not a safetensors file"):
            read_lora(path, "in=x")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["unet.a.lora_A.weight"], True),
        (["lora_unet_a.hada_w1_a"], True),
        (["lora_unet_a.lokr_w1"], True),
        (["unet.a.lora_magnitude_vector"], True),
        (["model.diffusion_model.out.2.weight"], False),
        (["a.alpha"], False),
        ([], False),
    ],
)
def test_what_is_a_lora(names: list[str], found: bool) -> None:
    assert is_lora(names) == found
