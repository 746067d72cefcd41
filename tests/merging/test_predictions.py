"""What a merge predicts is what its inputs do: carried into every format, and refused where they differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import read, tensors_of, write_model

from sdft.errors import UserError
from sdft.formats.metadata import lora_metadata, stated_prediction
from sdft.formats.model_checkpoint import Predicts, open_checkpoint
from sdft.formats.single_file import write_single_file
from sdft.merging import methods, sparsify
from sdft.merging.merge import merge
from sdft.merging.prediction import predicts
from sdft.merging.recipe import Step, open_recipe

QUERY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
EPSILON, V = Predicts("epsilon"), Predicts("v_prediction")
V_ZERO = Predicts("v_prediction", zero_terminal_snr=True)


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, str]:
    """Models: epsilon, v, and as single files one that does not say, and v with zero terminal SNR; LoRAs."""
    folders = {name: write_model(tmp_path / name, tensors_of(i), kind) for i, (name, kind) in enumerate(
        {"eps": "epsilon", "v": "v_prediction"}.items())}  # fmt: skip
    write_single_file(open_checkpoint("in", folders["eps"]), tmp_path / "file.safetensors")
    tensors = load_file(tmp_path / "file.safetensors")
    save_file(tensors, tmp_path / "unmarked.safetensors")
    marks = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    save_file(tensors | marks, tmp_path / "v_zero.safetensors")
    lora = {f"{QUERY}.lora_down.weight": torch.ones(2, 8), f"{QUERY}.lora_up.weight": torch.ones(12, 2)}
    for name, metadata in {
        "lora": None,
        "eps_lora": lora_metadata("x"),
        "v_lora": lora_metadata("x", "v_prediction"),
        "v_zero_lora": {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"},
    }.items():
        save_file(lora, tmp_path / f"{name}.safetensors", metadata)
    return {**{name: str(folder) for name, folder in folders.items()},
            **{file.stem: str(file) for file in tmp_path.glob("*.safetensors")}}  # fmt: skip


def step(method, inputs: dict[str, str], **given) -> Step:
    named = {key: [inputs[one] for one in x] if isinstance(x, list) else inputs[x] for key, x in given.items()}
    return Step(method, named)


SAME = {
    "two of epsilon, one of them unmarked": (methods.weighted_sum, {"a": "eps", "b": "unmarked"}, EPSILON),
    "a v-LoRA makes v of its base": (methods.add, {"base": "eps", "delta": "v_lora"}, V),
    "with its noise schedule": (methods.add, {"base": "unmarked", "delta": "v_zero_lora"}, V_ZERO),
    "a LoRA that does not say fits any base": (methods.add, {"base": "v", "delta": "lora"}, V),
    "a LoRA of epsilon does not change v": (methods.add, {"base": "v_zero", "delta": "eps_lora"}, V_ZERO),
    "LoRAs": (methods.sum_of, {"deltas": ["v_lora", "lora"]}, V),
    "LoRAs that do not say": (methods.sum_of, {"deltas": ["lora", "lora"]}, None),
    "v minus epsilon is a v-LoRA": (methods.difference, {"a": "v", "b": "eps"}, V),
    "models of v as changes of a base of epsilon": (sparsify.ties, {"base": "eps", "models": ["v", "v_lora"]}, V),
}


@pytest.mark.parametrize("kind", SAME)
def test_the_result_predicts_what_its_inputs_do(kind: str, inputs: dict[str, str]) -> None:
    method, given, expected = SAME[kind]
    assert predicts(open_recipe({"merged": step(method, inputs, **given)})) == expected


MIXED = {
    "epsilon and v": (methods.weighted_sum, {"a": "eps", "b": "v"}),
    "v and epsilon": (methods.weighted_sum, {"a": "v", "b": "eps"}),
    "a file that does not say counts as epsilon": (methods.weighted_sum, {"a": "unmarked", "b": "v_zero"}),
    "noise schedules": (methods.weighted_sum, {"a": "v", "b": "v_zero"}),
    "LoRAs": (methods.sum_of, {"deltas": ["v_lora", "eps_lora"]}),
    "task vectors": (sparsify.ties, {"base": "eps", "models": ["v_lora", "eps"]}),
    "three models": (methods.linear, {"models": ["eps", "unmarked", "v"]}),
}


@pytest.mark.parametrize("kind", MIXED)
def test_mixtures_are_refused_unless_told(kind: str, inputs: dict[str, str], tmp_path: Path) -> None:
    method, given = MIXED[kind]
    steps = {"merged": step(method, inputs, **given)}
    with pytest.raises(UserError, match=r"predicts .* and .*: a mixture of them predicts neither; pass prediction="):
        list(merge(steps, str(tmp_path / "out"), dry_run=True, rank=2 if method is methods.sum_of else None))
    assert not (tmp_path / "out").exists()
    assert predicts(open_recipe(steps), "epsilon").type == "epsilon"
    assert predicts(open_recipe(steps), "v_prediction").type == "v_prediction"


def test_it_is_carried_through_the_steps_of_a_recipe(inputs: dict[str, str]) -> None:
    first = step(methods.add, inputs, base="eps", delta="v_lora")
    good = {"first": first, "merged": Step(methods.weighted_sum, {"a": "first", "b": inputs["v"]})}
    assert predicts(open_recipe(good)) == V
    bad = {"first": first, "merged": Step(methods.weighted_sum, {"a": "first", "b": inputs["eps"]})}
    with pytest.raises(UserError, match=r"step first predicts v_prediction and first\.base=.*/eps epsilon"):
        predicts(open_recipe(bad))


@pytest.mark.parametrize("to", ["folder", "single_file"])
def test_a_model_says_what_it_predicts(to: str, inputs: dict[str, str], tmp_path: Path) -> None:
    """Whatever the base says: a baked v-LoRA with zero terminal SNR, and the way back."""
    out = tmp_path / ("baked" if to == "folder" else "baked.safetensors")
    base = Path(inputs["eps"])
    list(merge({"m": step(methods.add, inputs, base="eps", delta="v_zero_lora")}, str(out)))
    assert open_checkpoint("in", out).predicts == V_ZERO
    if to == "folder":
        config = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
        assert config["rescale_betas_zero_snr"] is True
        assert config["timestep_spacing"] == "trailing"
    else:
        with safe_open(out, "pt") as file:
            assert {"v_pred", "ztsnr"} <= set(file.keys())
            assert file.metadata()["modelspec.prediction_type"] == "v"
    back = tmp_path / ("back" if to == "folder" else "back.safetensors")
    told = {"m": Step(methods.weighted_sum, {"a": str(out), "b": str(base)})}
    list(merge(told, str(back), prediction="epsilon"))
    assert open_checkpoint("in", back).predicts == EPSILON


def test_a_lora_says_what_it_predicts(inputs: dict[str, str], tmp_path: Path) -> None:
    for name, given in {"v": ["v_zero_lora", "lora"], "silent": ["lora", "lora"]}.items():
        list(
            merge({"m": step(methods.sum_of, inputs, deltas=given)}, str(tmp_path / f"{name}_out.safetensors"), rank=2)
        )
    with safe_open(tmp_path / "v_out.safetensors", "pt") as file:
        assert stated_prediction(file.metadata()) == "v_prediction"
        assert file.metadata()["ss_zero_terminal_snr"] == "True"


def test_a_folder_of_an_inpainting_model_says_how_many_channels_it_takes(tmp_path: Path) -> None:
    wide = {"unet/conv_in.weight": torch.randn(6, 9, 3, 3)}
    models = [write_model(tmp_path / name, tensors_of(i) | wide) for i, name in enumerate("ab")]
    list(
        merge({"m": Step(methods.weighted_sum, dict(zip("ab", map(str, models), strict=True)))}, str(tmp_path / "out"))
    )
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["in_channels"] == 9
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLInpaintPipeline"
    assert read(tmp_path / "out")["unet/conv_in.weight"].shape == (6, 9, 3, 3)


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder_2"])
def test_a_model_without_a_part_is_refused_before_it_is_read(part: str, inputs: dict[str, str], tmp_path: Path) -> None:
    starts = {
        "vae": "first_stage_model.",
        "unet": "model.diffusion_model.out.",
        "text_encoder_2": "conditioner.embedders.1.",
    }
    tensors = load_file(inputs["unmarked"])
    if part == "unet":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.diffusion_model.")}
        tensors["model.diffusion_model.label_emb.0.0.weight"] = torch.ones(1)
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(starts[part])}
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"part\.safetensors"):
        open_recipe({"m": Step(methods.weighted_sum, {"a": str(tmp_path / "part.safetensors"), "b": inputs["eps"]})})


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    model = write_model(tmp_path / "a", tensors_of(0))
    whole = model / "unet" / "diffusion_pytorch_model.safetensors"
    whole.rename(whole.with_name("diffusion_pytorch_model-00001-of-00002.safetensors"))
    with pytest.raises(UserError, match=r"unet lacks diffusion_pytorch_model-00002-of-00002\.safetensors"):
        open_checkpoint("a", model)
