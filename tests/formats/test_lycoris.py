"""Rotations and trained norms in files: what LyCORIS makes of them, and what is read back and merged here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdft.errors import UserError
from sdft.evaluation.subject_loader import with_lora
from sdft.formats.adapter import applied_lora, lora_from_model, write_lora
from sdft.formats.convert import convert
from sdft.formats.lora_file import read_lora, write_lora_file
from sdft.formats.lora_keys import VECTORS, layer_of, vector_of
from sdft.formats.lora_layer import Layer, LoraFile, network_metadata
from sdft.formats.lora_stack import stack_loras
from sdft.merging import methods
from sdft.merging.merge import merge
from sdft.merging.recipe import Step
from sdft.models.load import pretrained
from sdft.models.nano import WEIGHTS as NANO
from sdft.models.sdxl import SDXL
from sdft.tuning.adapter import Adapter
from sdft.tuning.parameters import trainable_parameters

ALL_PARTS = ("unet", "text_encoder", "text_encoder_2")
TUNINGS = {
    "oft": {"rank": 4, "method": "oft", "layers": "conv"},
    "boft": {"rank": 6, "method": "boft", "layers": "conv", "parts": ALL_PARTS},
    "norms": {"rank": 2, "parts": ALL_PARTS, "train_norms": True},
    "oft_norms": {"rank": 4, "method": "oft", "train_norms": True, "train_biases": True},
}
QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA_QUERY = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
OUT = QUERY.replace("to_q", "to_out.0")


@pytest.fixture(scope="module")
def trained(tiny_model: Callable[..., SDXL]) -> Callable[[str], tuple[SDXL, Adapter]]:
    """The tiny model with everything that a tuning trains moved."""
    made: dict[str, tuple[SDXL, Adapter]] = {}

    def build(name: str) -> tuple[SDXL, Adapter]:
        if name not in made:
            model, tuning = tiny_model(), Adapter(**TUNINGS[name])
            tuning.attach(model)
            g = torch.Generator().manual_seed(8)
            with torch.no_grad():
                for _, p in trainable_parameters(model):
                    p.add_(0.1 * torch.randn(p.shape, generator=g))
            made[name] = model.eval(), tuning
        return made[name]

    return build


@torch.no_grad()
def outputs(model: SDXL) -> list[Tensor]:
    """Of the encoders, and of the UNet for latents of noise."""
    context, pooled = model.encode_prompts(["a red cat"])
    z_t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    time_ids = torch.ones(1, 6)
    cond = {"text_embeds": pooled, "time_ids": time_ids}
    return [context, pooled, model.unet(z_t, 300, context, added_cond_kwargs=cond).sample]


def assert_same(one: list[Tensor], other: list[Tensor], before: list[Tensor]) -> None:
    """Equal but for float rounding, in units of the change."""
    moved = [float((a - b).abs().max()) for a, b in zip(one, before, strict=True)]
    assert moved[-1] > 0.01
    for a, b, change in zip(one, other, moved, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * change


def loaded_by_lycoris(model: SDXL, file: Path) -> set[str]:
    """Let LyCORIS apply a file, as its loaders do for each layer; its kinds."""
    modules = pytest.importorskip("lycoris.modules", reason="needs LyCORIS: pip install '.[dev]'")
    state, kinds = load_file(file), set()
    for name in dict.fromkeys(key.split(".")[0] for key in state):
        try:
            layer = layer_of(name)
        except KeyError:
            layer = vector_of(name, "w_norm").removesuffix(".weight")
        part, _, own = layer.partition("/")
        known = dict(model.get_submodule(part).named_modules())
        kind, tensors = modules.get_module(state, name)
        found = modules.make_module(kind, tensors, name, known.get(own) or known[own.removeprefix("text_model.")])
        found.apply_to()
        kinds.add(kind.name)
    return kinds


@pytest.mark.parametrize(("name", "kinds"), [("oft", {"diag-oft"}), ("boft", {"boft"}), ("norms", {"locon", "norm"})])
def test_lycoris_does_what_was_trained(
    name: str, kinds: set[str], tiny_model: Callable, trained: Callable, tmp_path: Path
) -> None:
    live, tuning = trained(name)
    write_lora(live, tmp_path / "x.safetensors", torch.float32, "kohya", initial=tuning.initial)
    other = tiny_model()
    before = outputs(other)
    assert loaded_by_lycoris(other, tmp_path / "x.safetensors") == kinds
    assert_same(outputs(live), outputs(other), before)


@pytest.mark.parametrize("name", TUNINGS)
def test_a_file_is_applied_as_it_was_trained(
    name: str, tiny_model: Callable, trained: Callable, tmp_path: Path
) -> None:
    live, tuning = trained(name)
    write_lora(live, tmp_path / "x.safetensors", torch.float32, "kohya", initial=tuning.initial)
    model = tiny_model()
    before, modules = outputs(model), [(key, id(module)) for key, module in model.named_modules()]
    weights = copy.deepcopy(model.state_dict())
    with with_lora(model, tmp_path / "x.safetensors"):
        assert_same(outputs(live), outputs(model), before)
    assert [(key, id(module)) for key, module in model.named_modules()] == modules
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_the_names_in_files(trained: Callable, tmp_path: Path) -> None:
    """Of LyCORIS for rotations and norms, of ComfyUI for biases; in fp32, as fp16 would lose small changes."""
    live, tuning = trained("oft_norms")
    write_lora(live, tmp_path / "x.safetensors", torch.float16, "kohya", initial=tuning.initial)
    tensors = load_file(tmp_path / "x.safetensors")
    assert tensors[f"{KOHYA_QUERY}.oft_blocks"].shape == (6, 4, 4)
    assert tensors[f"{KOHYA_QUERY}.oft_blocks"].dtype == torch.float16
    assert tensors[f"{KOHYA_QUERY}.alpha"] == 0
    assert f"{KOHYA_QUERY}.diff_b" not in tensors  # it has no bias
    layer = live.unet.get_submodule(OUT)
    change = tensors[f"{KOHYA_QUERY.replace('to_q', 'to_out_0')}.diff_b"]
    assert change.dtype == torch.float32
    torch.testing.assert_close(tuning.initial[f"unet.{OUT}.base_layer.bias"] + change, layer.base_layer.bias.detach())
    for key, norm in {
        "lora_unet_input_blocks_1_0_in_layers_0": "down_blocks.0.resnets.0.norm1",
        "lora_unet_input_blocks_4_1_norm": "down_blocks.1.attentions.0.norm",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_norm3": f"{OUT.rpartition('.attn1')[0]}.norm3",
        "lora_unet_out_0": "conv_norm_out",
    }.items():
        for suffix in ("w_norm", "b_norm"):
            found = getattr(live.unet.get_submodule(norm), VECTORS[suffix])
            before = tuning.initial[f"unet.{norm}.{VECTORS[suffix]}"]
            torch.testing.assert_close(before + tensors[f"{key}.{suffix}"], found.detach())
        assert f"{key}.alpha" not in tensors


def test_nothing_is_lost_in_a_round_trip(trained: Callable, tmp_path: Path) -> None:
    live, tuning = trained("oft_norms")
    write_lora(live, tmp_path / "a.safetensors", layout="kohya", initial=tuning.initial)
    convert(str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "kohya", NANO)
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) and tensor.dtype == two[name].dtype for name, tensor in one.items())


@pytest.mark.parametrize(("name", "kind"), [("oft", "oft"), ("boft", "boft"), ("norms", "trained norms and biases")])
def test_diffusers_has_no_form_for_them(name: str, kind: str, trained: Callable, tmp_path: Path) -> None:
    live, tuning = trained(name)
    with pytest.raises(UserError, match=f"diffusers cannot represent {kind} .*write the kohya layout"):
        write_lora(live, tmp_path / "x.safetensors", initial=tuning.initial)
    assert list(tmp_path.iterdir()) == []


def test_what_the_metadata_say(trained: Callable) -> None:
    def network(name: str) -> list[str | None]:
        live, tuning = trained(name)
        found = network_metadata(lora_from_model(live, tuning.initial))
        return [found.get(f"ss_network_{what}") for what in ("module", "alpha", "args")]

    assert network("oft") == ["lycoris.kohya", "0", '{"algo": "diag-oft"}']
    assert network("boft") == ["lycoris.kohya", "0", '{"algo": "boft"}']
    assert network("norms") == ["lycoris.kohya", "2", '{"train_norm": "True"}']


def test_files_of_lycoris_with_a_bound_and_factors(tiny_model: Callable, tmp_path: Path) -> None:
    """`constraint` and `rescaled`, which only LyCORIS trains; alpha as an integer, as it writes it for `0`."""
    g, model = torch.Generator().manual_seed(3), tiny_model()
    shape = {"oft": (6, 4, 4), "boft": (3, 4, 6, 6)}
    for alpha in (torch.tensor(0.002), torch.tensor(0)):
        for kind, blocks in shape.items():
            tensors = {
                f"{KOHYA_QUERY}.oft_blocks": torch.randn(blocks, generator=g),
                f"{KOHYA_QUERY}.rescale": 1 + 0.1 * torch.randn(24, 1, generator=g),
                f"{KOHYA_QUERY}.alpha": alpha,
            }
            save_file(tensors, tmp_path / f"{kind}.safetensors")
            other = copy.deepcopy(model)
            loaded_by_lycoris(other, tmp_path / f"{kind}.safetensors")
            x = torch.randn(3, 24, generator=g)
            with with_lora(model, tmp_path / f"{kind}.safetensors"):
                ours = model.unet.get_submodule(QUERY)(x)
            theirs, base = (m.unet.get_submodule(QUERY)(x) for m in (other, model))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
            assert (ours - base).abs().max() > 0.01


def test_blocks_as_kohyas_scripts_cut_them_are_read(tiny_model: Callable, tmp_path: Path) -> None:
    """Few large ones; a file without alpha has no bound."""
    model, g = tiny_model(), torch.Generator().manual_seed(3)
    blocks, x = torch.randn(2, 12, 12, generator=g), torch.randn(3, 24, generator=g)
    save_file({f"{KOHYA_QUERY}.oft_blocks": blocks}, tmp_path / "x.safetensors")
    layer, q, identity = model.unet.get_submodule(QUERY), blocks - blocks.mT, torch.eye(12)
    turns = torch.block_diag(*((identity + q) @ torch.linalg.inv(identity - q)))
    with with_lora(model, tmp_path / "x.safetensors"):
        found = model.unet.get_submodule(QUERY)(x)
    torch.testing.assert_close(found, x @ (turns.T @ layer.weight).T, atol=1e-5, rtol=1e-5)


def test_a_rotation_of_other_rows_is_refused_and_nothing_is_changed(tiny_model: Callable, tmp_path: Path) -> None:
    model = tiny_model()
    tensors = {
        f"{KOHYA_QUERY}.oft_blocks": torch.zeros(8, 4, 4),
        "lora_unet_out_0.w_norm": torch.zeros(7),
        "lora_unet_input_blocks_1_0_in_layers_2.diff_b": torch.ones(16),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    before = copy.deepcopy(model.state_dict())
    message = r"x: the LoRA does not fit .*2 of 3 layers, for example unet/.*to_q changes 32 rows, .* has 24 x 24 there"
    with pytest.raises(UserError, match=message), with_lora(model, tmp_path / "x.safetensors", "x"):
        pass
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["oft", "boft"])
def test_a_strength_other_than_one_is_for_merges(kind: str, trained: Callable) -> None:
    lora = lora_from_model(trained(kind)[0])
    message = rf"x: the strength of a {kind.upper()} must be 1; bake it into the model"
    with pytest.raises(UserError, match=message):
        stack_loras([(lora, 0.5)], "x")
    assert stack_loras([(lora, 1.0)], "x").layers.keys() == lora.layers.keys()


def test_stacked_loras_add_their_norms_times_their_strengths() -> None:
    norm, bias = "unet/conv_norm_out.weight", "unet/conv_norm_out.bias"
    one = LoraFile({}, vectors={norm: torch.tensor([1.0, 2.0]), bias: torch.tensor([3.0])})
    two = LoraFile({}, vectors={norm: torch.tensor([10.0, 20.0])})
    found = stack_loras([(one, 0.5), (two, 2.0)], "x").vectors
    assert {name: change.tolist() for name, change in found.items()} == {norm: [20.5, 41.0], bias: [1.5]}
    assert stack_loras([(two, 3.0)], "x").vectors[norm].tolist() == [30.0, 60.0]


def baked(file: Path, out: Path, scale: float = 1.0) -> SDXL:
    steps = {"merged": Step(methods.add, {"base": "nano", "delta": str(file)}, {"scale": scale})}
    list(merge(steps, str(out), dtype="fp32"))
    return pretrained(str(out)).eval()


@pytest.mark.parametrize("kind", ["oft", "boft"])
def test_baking_is_applying(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in chunks that cut the blocks; and at half strength, half of the change."""
    monkeypatch.setattr("sdft.merging.compute.CHUNK_SIZE", 2000)
    nano, g = pretrained("nano").eval(), torch.Generator().manual_seed(4)
    rows = nano.unet.get_submodule(QUERY).weight.shape[0]
    blocks = {"oft": (rows // 8, 8, 8), "boft": (3, rows // 6, 6, 6)}[kind]
    vectors = {
        "unet/conv_norm_out.weight": 0.1 * torch.randn(nano.unet.conv_norm_out.weight.shape, generator=g),
        f"unet/{OUT}.bias": 0.1 * torch.randn(nano.unet.get_submodule(OUT).bias.shape, generator=g),
    }
    layer = Layer({"oft_blocks": 0.2 * torch.randn(blocks, generator=g)}, 0.0)
    lora = LoraFile({f"unet/{QUERY}": layer, f"unet/{OUT}": layer}, vectors=vectors)
    write_lora_file(lora, tmp_path / "x.safetensors", "kohya")
    x = torch.randn(3, rows, generator=g)
    before = [nano.unet.get_submodule(name)(x) for name in (QUERY, OUT)]
    with applied_lora(nano, lora, "x"):
        applied = [nano.unet.get_submodule(name)(x) for name in (QUERY, OUT)]
        norm = nano.unet.conv_norm_out.weight.detach().clone()
    whole, half = (baked(tmp_path / "x.safetensors", tmp_path / f"{s}", s) for s in (1.0, 0.5))
    for name, old, new in zip((QUERY, OUT), before, applied, strict=True):
        assert (new - old).abs().max() > 0.1
        torch.testing.assert_close(whole.unet.get_submodule(name)(x), new, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(half.unet.get_submodule(name)(x), (old + new) / 2, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole.unet.conv_norm_out.weight, norm)
    assert torch.equal(nano.unet.conv_norm_out.bias, whole.unet.conv_norm_out.bias)


def test_a_model_is_loaded_with_them_baked_in(tmp_path: Path) -> None:
    """As `model.loras` does, before training."""
    nano, g = pretrained("nano").eval(), torch.Generator().manual_seed(4)
    rows, bias = nano.unet.get_submodule(QUERY).weight.shape[0], f"unet/{OUT}.bias"
    layer = Layer({"oft_blocks": 0.2 * torch.randn(rows // 8, 8, 8, generator=g)}, 0.0)
    lora = LoraFile({f"unet/{QUERY}": layer, f"unet/{OUT}": layer}, vectors={bias: torch.ones(rows)})
    write_lora_file(lora, tmp_path / "x.safetensors", "kohya")
    loaded = pretrained("nano", loras=[{"lora": str(tmp_path / "x.safetensors"), "scale": 0.5}]).eval()
    x = torch.randn(3, rows, generator=g)
    for name in (QUERY, OUT):
        before = nano.unet.get_submodule(name)(x)
        with applied_lora(nano, lora, "x"):
            after = nano.unet.get_submodule(name)(x)
        torch.testing.assert_close(loaded.unet.get_submodule(name)(x), (before + after) / 2, atol=1e-4, rtol=1e-4)
    write_lora_file(LoraFile({}, vectors={bias: torch.ones(3)}), tmp_path / "x.safetensors", "kohya")
    with pytest.raises(UserError, match=rf"does not fit .*1 of 1 layers, .*{bias} changes 3 numbers, .* \[{rows}\]"):
        pretrained("nano", loras=[{"lora": str(tmp_path / "x.safetensors")}])


def test_merges_that_lack_a_model_are_refused(tmp_path: Path) -> None:
    turned, norms = tmp_path / "turned.safetensors", tmp_path / "norms.safetensors"
    save_file({f"{KOHYA_QUERY}.oft_blocks": torch.zeros(12, 8, 8)}, turned)
    save_file({"lora_unet_out_0.w_norm": torch.ones(64)}, norms)

    def summed(file: Path) -> None:
        steps = {"merged": Step(methods.sum_of, {"deltas": [str(file)]}, {})}
        list(merge(steps, str(tmp_path / "out.safetensors"), rank=2))

    with pytest.raises(UserError, match=r"is an OFT, whose change depends on the model; bake it"):
        summed(turned)
    with pytest.raises(UserError, match=r"norms.safetensors: has trained norms or biases, .*; bake it into a model"):
        summed(norms)
    steps = {"merged": Step(methods.add, {"base": "nano", "delta": str(norms)}, {})}
    save_file({"lora_unet_out_0.w_norm": torch.ones(63)}, norms)
    with pytest.raises(UserError, match=r"conv_norm_out.weight: \[64\] in .*, a change of \[63\] in"):
        list(merge(steps, str(tmp_path / "out")))


def test_all_norms_of_the_model_have_a_name(trained: Callable, tmp_path: Path) -> None:
    live, tuning = trained("norms")
    norms = [
        module for part in ALL_PARTS for module in live.get_submodule(part).modules()
        if isinstance(module, nn.LayerNorm | nn.GroupNorm)
    ]  # fmt: skip
    assert len(tuning.initial) == 2 * (len(norms) - 3)  # encoder 1's last layer and final norm are not used
    write_lora(live, tmp_path / "x.safetensors", layout="kohya", initial=tuning.initial)
    assert len(read_lora(tmp_path / "x.safetensors", "in").vectors) == len(tuning.initial)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert not any("base_layer" in name for name in file.keys())  # noqa: SIM118
