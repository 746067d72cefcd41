"""What a LoRA file does in diffusers, and here, is what its formula does to the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor

from sdft.errors import UserError
from sdft.evaluation.subject_loader import with_lora
from sdft.formats.adapter import lora_from_model, write_lora
from sdft.formats.lora_file import write_lora_file
from sdft.formats.lora_layer import DOWN, UP, Layer, LoraFile, with_one_alpha
from sdft.models.load import pretrained
from sdft.models.sdxl import SDXL
from sdft.tuning.adapter import Adapter

ALL_PARTS = ("unet", "text_encoder", "text_encoder_2")
ALPHA = 7.0
QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA_QUERY = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"

TUNINGS = {
    "lora": {},
    "lora_te": {"parts": ALL_PARTS},
    "locon": {"layers": "conv"},
    "dora": {"method": "dora", "layers": "conv"},
    "dora_te": {"method": "dora", "parts": ALL_PARTS, "layers": "attention"},
    "loha": {"method": "loha", "layers": "conv", "parts": ALL_PARTS},
    "lokr": {"method": "lokr", "layers": "conv", "parts": ALL_PARTS},
}
IN_DIFFUSERS = [
    *((name, "diffusers") for name in ("lora", "lora_te", "locon", "dora", "dora_te")),
    *((name, "kohya") for name in ("lora", "lora_te", "locon")),
]
IN_KOHYA_ONLY = [(name, "kohya") for name in ("dora", "dora_te", "loha", "lokr")]


@pytest.fixture(scope="module")
def nano() -> SDXL:
    return pretrained("nano").eval()


@pytest.fixture(scope="module")
def trained(nano: SDXL) -> Callable[[str], SDXL]:
    """nano with the adapters of a tuning, every one of them filled with numbers."""
    made: dict[str, SDXL] = {}

    def build(name: str) -> SDXL:
        if name not in made:
            model = copy.deepcopy(nano)
            Adapter(rank=3, alpha=ALPHA, **TUNINGS[name]).attach(model)
            fill(model)
            made[name] = model.eval()
        return made[name]

    return build


@pytest.fixture(scope="module")
def before(nano: SDXL) -> dict[str, Tensor]:
    return outputs(nano)


@pytest.fixture(scope="module")
def expected(nano: SDXL, trained: Callable) -> Callable[[str], dict[str, Tensor]]:
    """What the formula makes of nano and a tuning's adapters."""
    made: dict[str, dict[str, Tensor]] = {}

    def build(name: str) -> dict[str, Tensor]:
        if name not in made:
            made[name] = outputs(merged(nano, trained(name)))
        return made[name]

    return build


def fill(model: SDXL) -> None:
    g = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "magnitude" in name:
                p.mul_(1 + 0.2 * torch.rand(p.shape, generator=g))
            elif p.requires_grad:
                # LoHa's change is a product of four, LoKr's of two or three that are small.
                size = 0.3 if "hada_" in name else 0.15 if "lokr_" in name else 0.1
                p.copy_(size * torch.randn(p.shape, generator=g))


def merged(nano: SDXL, live: SDXL) -> SDXL:
    """The base with the change that the papers' formulas make of the adapters' numbers."""
    model = copy.deepcopy(nano)
    with torch.no_grad():
        for name, adapted in live.named_modules():
            if isinstance(adapted, BaseTunerLayer):
                weight = model.get_submodule(name).weight
                weight.copy_(changed(weight, {key: p.detach() for key, p in adapted.named_parameters()}))
    return model


def changed(weight: Tensor, p: dict[str, Tensor]) -> Tensor:
    """W + alpha / r B A, and its like, with the tensors as peft has them."""
    scale = ALPHA / 3
    if "lora_A.default.weight" in p:
        a, b = p["lora_A.default.weight"].flatten(1), p["lora_B.default.weight"].flatten(1)
        new = weight + scale * (b @ a).view_as(weight)
        if "lora_magnitude_vector.default.weight" in p:
            norms = new.flatten(1).norm(dim=1)
            factor = p["lora_magnitude_vector.default.weight"].flatten() / norms
            new = new * factor.view(-1, *[1] * (weight.dim() - 1))
        return new
    if "hada_w1_a.default" in p:
        one, two = (p[f"hada_w{i}_a.default"] @ p[f"hada_w{i}_b.default"] for i in (1, 2))
        return weight + scale * (one * two).view_as(weight)
    one, two = (
        p[f"lokr_w{i}.default"] if f"lokr_w{i}.default" in p else p[f"lokr_w{i}_a.default"] @ p[f"lokr_w{i}_b.default"]
        for i in (1, 2)
    )
    if two.dim() == 4:
        one = one[:, :, None, None]
    return weight + scale * torch.kron(one, two).view_as(weight)


def pipeline_of(model: SDXL) -> StableDiffusionXLPipeline:
    names = (*ALL_PARTS, "vae", "tokenizer", "tokenizer_2", "scheduler")
    pipeline = StableDiffusionXLPipeline(**{name: getattr(model, name) for name in names}, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def outputs(model: SDXL) -> dict[str, Tensor]:
    """The outputs of the encoders, and the latents of a picture of three steps."""
    context, pooled = model.encode_prompts(["a red cat"])
    drawn = pipeline_of(model)(
        "a red cat",
        num_inference_steps=3,
        height=32,
        width=32,
        guidance_scale=3.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(1),
    ).images
    return {"context": context, "pooled": pooled, "picture": drawn}


def assert_same(
    name: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], before: dict[str, Tensor]
) -> None:
    """Equal but for float rounding, in units of the change that the LoRA makes; and it makes one."""
    for what, tensor in ours.items():
        change = float((tensor - before[what]).abs().max())
        if what == "picture" or "parts" in TUNINGS[name]:
            assert change > 0.01 * float(before[what].abs().max()), what
        assert float((tensor - theirs[what]).abs().max()) <= 1e-3 * change, what


@pytest.mark.parametrize(("name", "layout"), IN_DIFFUSERS)
def test_both_files_do_in_diffusers_what_the_formula_does(
    name: str, layout: str, nano: SDXL, trained: Callable, expected: Callable, before: dict, tmp_path: Path
) -> None:
    """alpha is 7 and the rank 3: a file with alpha = rank, or misnames a layer, gives another picture."""
    write_lora(trained(name), tmp_path / "lora.safetensors", torch.float32, layout)
    other = copy.deepcopy(nano)
    pipeline_of(other).load_lora_weights(str(tmp_path / "lora.safetensors"))
    assert_same(name, expected(name), outputs(other), before)


@pytest.mark.parametrize(("name", "layout"), [*IN_DIFFUSERS, *IN_KOHYA_ONLY])
def test_every_file_does_here_what_the_formula_does(
    name: str, layout: str, nano: SDXL, trained: Callable, expected: Callable, before: dict, tmp_path: Path
) -> None:
    write_lora(trained(name), tmp_path / "lora.safetensors", torch.float32, layout)
    modules = [(key, id(module)) for key, module in nano.named_modules()]
    with with_lora(nano, tmp_path / "lora.safetensors"):
        theirs = outputs(nano)
    assert_same(name, expected(name), theirs, before)
    assert [(key, id(module)) for key, module in nano.named_modules()] == modules
    assert all(torch.equal(tensor, before[what]) for what, tensor in outputs(nano).items())


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


def test_uneven_ranks_and_alphas_are_kept(nano: SDXL, trained: Callable, tmp_path: Path) -> None:
    """By diffusers in its own layout, here in both: diffusers 0.42 loses uneven alphas of a kohya file's attention."""
    lora = uneven(lora_from_model(trained("lora_te")))
    expected = {
        name.replace("text_encoder/text_model.", "text_encoder/").replace("/", "."): layer.scale
        for name, layer in lora.layers.items()
    }
    assert len(set(expected.values())) > 15

    def scales(model: SDXL) -> dict[str, float]:
        adapted = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        return {name: next(iter(m.scaling.values())) for name, m in adapted.items()}

    for layout in ("kohya", "diffusers"):
        write_lora_file(lora, tmp_path / f"{layout}.safetensors", layout)
        with with_lora(nano, tmp_path / f"{layout}.safetensors"):
            assert scales(nano) == pytest.approx(expected)
    other = copy.deepcopy(nano)
    pipeline_of(other).load_lora_weights(str(tmp_path / "diffusers.safetensors"))
    assert scales(other) == pytest.approx(expected)


def test_layers_of_all_kinds_go_together(nano: SDXL, trained: Callable, tmp_path: Path) -> None:
    """One file with a LoRA, a LoCon, a LoHa, a LoKr and a DoRA, each on its own module."""
    attention = "unet/down_blocks.1.attentions.0.transformer_blocks.0"
    kinds = {"lora": f"{attention}.attn1.to_q", "locon": "unet/down_blocks.0.resnets.0.conv1"}
    kinds |= {name: f"{attention}.attn1.to_{x}" for name, x in (("loha", "k"), ("lokr", "v"), ("dora", "out.0"))}
    layers = {name: lora_from_model(trained(kind)).layers[name] for kind, name in kinds.items()}
    write_lora_file(LoraFile(layers), tmp_path / "lora.safetensors", "kohya")
    inputs = {name: torch.randn(1, 96, generator=torch.Generator().manual_seed(2)) for name in kinds.values()}
    inputs[kinds["locon"]] = torch.randn(1, 64, 5, 5, generator=torch.Generator().manual_seed(2))
    with with_lora(nano, tmp_path / "lora.safetensors"):
        ours = {name: nano.get_submodule(name.replace("/", "."))(x) for name, x in inputs.items()}
    for kind, name in kinds.items():
        theirs = trained(kind).get_submodule(name.replace("/", "."))(inputs[name])
        torch.testing.assert_close(ours[name], theirs, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours[name], nano.get_submodule(name.replace("/", "."))(inputs[name]), atol=1e-3)


def test_a_mid_is_part_of_the_change(nano: SDXL, tmp_path: Path) -> None:
    """LoCon as LyCORIS cuts it: 1x1 down, 3x3 mid, 1x1 up; by hand, one convolution after the other."""
    g, name = torch.Generator().manual_seed(0), "unet/down_blocks.0.resnets.0.conv1"
    shapes = {"lora_down.weight": (2, 64, 1, 1), "lora_mid.weight": (2, 2, 3, 3), "lora_up.weight": (64, 2, 1, 1)}
    tensors = {suffix: torch.randn(shape, generator=g) for suffix, shape in shapes.items()}
    x, conv = torch.randn(1, 64, 5, 5, generator=g), nano.unet.down_blocks[0].resnets[0].conv1
    inner = torch.nn.functional.conv2d(x, tensors["lora_down.weight"])
    inner = torch.nn.functional.conv2d(inner, tensors["lora_mid.weight"], padding=1)
    by_hand = conv(x) + 3.0 / 2 * torch.nn.functional.conv2d(inner, tensors["lora_up.weight"])
    for layout in ("kohya", "diffusers"):
        write_lora_file(LoraFile({name: Layer(tensors, 3.0)}), tmp_path / "lora.safetensors", layout)
        with with_lora(nano, tmp_path / "lora.safetensors"):
            torch.testing.assert_close(nano.unet.down_blocks[0].resnets[0].conv1(x), by_hand, rtol=1e-4, atol=1e-4)


def test_cores_of_loha_and_lokr_are_part_of_the_change(nano: SDXL, tmp_path: Path) -> None:
    """Tucker's cores, which our own training does not make: by the definition, index by index."""
    g, name = torch.Generator().manual_seed(0), "unet/down_blocks.0.resnets.0.conv1"
    w = {x: torch.randn(2, 64, generator=g) for x in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}
    t = {x: torch.randn(2, 2, 3, 3, generator=g) for x in ("hada_t1", "hada_t2")}
    one, two = (torch.einsum("ijkl,ip,jr->prkl", t[f"hada_t{i}"], w[f"hada_w{i}_a"], w[f"hada_w{i}_b"]) for i in (1, 2))
    lokr = {"lokr_w1": torch.randn(4, 4, generator=g), "lokr_t2": torch.randn(2, 2, 3, 3, generator=g)}
    lokr |= {x: torch.randn(2, 16, generator=g) for x in ("lokr_w2_a", "lokr_w2_b")}
    small = torch.einsum("ijkl,ip,jr->prkl", lokr["lokr_t2"], lokr["lokr_w2_a"], lokr["lokr_w2_b"])
    kron = torch.einsum("ab,cdkl->acbdkl", lokr["lokr_w1"], small).reshape(64, 64, 3, 3)
    x, conv = torch.randn(1, 64, 5, 5, generator=g), nano.unet.down_blocks[0].resnets[0].conv1
    for tensors, change in ((w | t, one * two), (lokr, kron)):
        write_lora_file(LoraFile({name: Layer(tensors, 3.0)}), tmp_path / "lora.safetensors", "kohya")
        by_hand = conv(x) + 3.0 / 2 * torch.nn.functional.conv2d(x, change, padding=1)
        with with_lora(nano, tmp_path / "lora.safetensors"):
            torch.testing.assert_close(nano.unet.down_blocks[0].resnets[0].conv1(x), by_hand, rtol=1e-4, atol=1e-3)


def test_a_lora_of_another_size_is_refused_without_a_trace(nano: SDXL, tmp_path: Path) -> None:
    down, up = (f"{KOHYA_QUERY}.lora_{way}.weight" for way in ("down", "up"))
    save_file({down: torch.ones(2, 640), up: torch.ones(640, 2)}, tmp_path / "lora.safetensors")
    before = [(key, id(module)) for key, module in nano.named_modules()]
    message = rf"^x: the LoRA does not fit .*1 of 1 layers, for example unet/{QUERY} changes 640 x 640 .* has 96 x 96"
    with pytest.raises(UserError, match=message), with_lora(nano, tmp_path / "lora.safetensors", "x"):
        pass
    assert [(key, id(module)) for key, module in nano.named_modules()] == before


def test_one_alpha_leaves_the_deltas() -> None:
    """The most common alpha of each part; a layer that is switched off stays so, and other kinds as they are."""

    def layer(rank: int, alpha: float, dtype: torch.dtype = torch.float32) -> Layer:
        generator = torch.Generator().manual_seed(rank)
        return Layer({DOWN: torch.randn(rank, 6, generator=generator).to(dtype),
                      UP: torch.randn(5, rank, generator=generator).to(dtype)}, alpha)  # fmt: skip

    layers = {
        "unet/a": layer(4, 4.0), "unet/b": layer(4, 4.0), "unet/c": layer(2, 7.0), "unet/off": layer(2, 0.0),
        "unet/half": layer(3, 8.0, torch.float16), "text_encoder/a": layer(4, 3.0),
        "unet/kron": Layer({"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 2)}, 9.0),
    }  # fmt: skip
    found = with_one_alpha(LoraFile(layers, {"title": "x"}))
    alphas = {name: one.alpha for name, one in found.layers.items()}
    assert alphas == dict.fromkeys(layers, 4.0) | {"text_encoder/a": 3.0, "unet/kron": 9.0}
    for name, before in layers.items():
        after = found.layers[name]
        if UP not in before.tensors:
            assert after is before
            continue
        assert after.tensors[UP].dtype == before.tensors[UP].dtype
        deltas = [one.scale * one.tensors[UP].float() @ one.tensors[DOWN].float() for one in (before, after)]
        rounding = 2e-3 if name == "unet/half" else 1e-6
        torch.testing.assert_close(*deltas, rtol=rounding, atol=rounding)
    assert found.layers["unet/a"] is layers["unet/a"]
    assert found.metadata == {"title": "x"}
    off = LoraFile({"unet/off": layer(2, 0.0)})
    assert with_one_alpha(off) == off
