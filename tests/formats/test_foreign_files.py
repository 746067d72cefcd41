"""Files of other programs: what can be read is read, the rest is named for what it is."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdft.formats.__main__ as formats
from sdft.errors import UserError
from sdft.evaluation.subject_loader import SubjectLoader
from sdft.evaluation.subjects import read_subjects
from sdft.formats.convert import convert
from sdft.formats.json_file import read_json
from sdft.formats.lora_file import read_lora
from sdft.formats.model_checkpoint import Checkpoint, WeightView, open_checkpoint, refuse_incomplete
from sdft.formats.run_folder import read_run_outputs
from sdft.formats.safetensors_io import StoredTensor
from sdft.formats.single_file import write_single_file
from sdft.models.load import pretrained
from sdft.models.nano import WEIGHTS as NANO

LAYER = "unet/down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
MODULE = LAYER.removeprefix("unet/")
KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP = torch.randn(2, 8), torch.randn(8, 2)
GOOD = {f"{KOHYA}.lora_down.weight": DOWN, f"{KOHYA}.lora_up.weight": UP}


def saved(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    return path


@pytest.fixture(scope="module")
def nano_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nano") / "nano.safetensors"
    write_single_file(open_checkpoint("in", NANO), path)
    return path


PEFT = {
    "peft's prefix": f"base_model.model.{MODULE}.lora_{{}}.weight",
    "peft's prefix with the part": f"base_model.model.unet.{MODULE}.lora_{{}}.weight",
    "the name of an adapter": f"unet.{MODULE}.lora_{{}}.default.weight",
    "both": f"base_model.model.{MODULE}.lora_{{}}.style.weight",
    "a UNet alone": f"{MODULE}.lora_{{}}.weight",
}


@pytest.mark.parametrize("kind", PEFT)
def test_the_names_of_peft_are_read(kind: str, tmp_path: Path) -> None:
    file = saved(tmp_path / "x.safetensors", {PEFT[kind].format("A"): DOWN, PEFT[kind].format("B"): UP})
    lora = read_lora(file, "in")
    assert list(lora.layers) == [LAYER]
    assert torch.equal(lora.layers[LAYER].tensors["lora_down.weight"], DOWN)
    assert torch.equal(lora.layers[LAYER].tensors["lora_up.weight"], UP)


OTHERS = {
    "tensors of an unknown kind": f"{KOHYA}.w_norm",
    "whole weights (diff) of LyCORIS": f"{KOHYA}.diff",
    "OFT or BOFT of peft, or of early LyCORIS": f"{KOHYA}.oft_diag",
    "GLoRA": f"{KOHYA}.a1.weight",
    "IA3": f"{KOHYA}.on_input",
    "embeddings of new words": "bundle_emb.zorbix.string_to_param",
    "alphas without weights": "lora_unet_mid_block_attentions_0_proj_in.alpha",
    "layers that SDXL does not have": "lora_unet_nowhere.lora_up.weight",
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_lora_is_named_and_may_be_left_out(kind: str, tmp_path: Path) -> None:
    file = saved(tmp_path / "x.safetensors", GOOD | {OTHERS[kind]: torch.ones(1)})
    with pytest.raises(UserError) as refused:
        read_lora(file, "in")
    assert f"has 1 tensors that cannot be read: 1 {kind} ({OTHERS[kind]})" in str(refused.value)
    assert "skip_unknown=true" in str(refused.value)
    with pytest.warns(UserWarning, match="they are left out"):
        convert(str(file), str(tmp_path / "y.safetensors"), "diffusers", NANO, skip_unknown=True)
    assert list(read_lora(tmp_path / "y.safetensors", "in").layers) == [LAYER]


def test_an_adapter_of_another_kind_alone_has_nothing_to_read(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.safetensors", {f"{KOHYA}.on_input": torch.ones(1)})
    for skip in (False, True):
        with pytest.raises(UserError, match=r"has 1 tensors that cannot be read: 1 IA3 \(.*on_input\)$"):
            read_lora(file, "in", skip)


def test_a_bias_goes_with_its_weight(tmp_path: Path) -> None:
    """LyCORIS writes both for a layer that was trained as a whole; a bias alone would be half of it."""
    other = KOHYA.replace("to_q", "to_out_0")
    tensors = GOOD | {f"{other}.diff": torch.ones(8, 8), f"{other}.diff_b": torch.ones(8)}
    with pytest.raises(UserError, match=r"has 2 tensors that cannot be read: 2 whole weights \(diff\) of LyCORIS"):
        read_lora(saved(tmp_path / "x.safetensors", tensors), "in")
    del tensors[f"{other}.diff"]
    (name,) = read_lora(saved(tmp_path / "x.safetensors", tensors), "in").vectors
    assert name == LAYER.replace("to_q", "to_out.0.bias")


def test_many_unknown_tensors_are_counted(tmp_path: Path) -> None:
    file = saved(
        tmp_path / "x.safetensors", GOOD | {f"lora_unet_{i}.lora_up.weight": torch.ones(1) for i in range(900)}
    )
    with pytest.raises(
        UserError, match=r"has 900 tensors that cannot be read: 900 layers .*lora_unet_0.*, \.\.\.\)"
    ) as one:
        read_lora(file, "in")
    assert len(str(one.value)) < 600


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_lora_of_8_bits_is_read_as_fp16(dtype: torch.dtype, tmp_path: Path) -> None:
    file = saved(tmp_path / "x.safetensors", {name: tensor.to(dtype) for name, tensor in GOOD.items()})
    convert(str(file), str(tmp_path / "y.safetensors"), "kohya", NANO)
    written = load_file(tmp_path / "y.safetensors")
    (name,) = (name for name in written if name.endswith(".lora_up.weight"))
    assert torch.equal(written[name], UP.to(dtype).half())


def test_a_damaged_layer_of_a_lora_is_named(tmp_path: Path) -> None:
    file = saved(tmp_path / "x.safetensors", GOOD | {f"{KOHYA}.lora_up.weight": UP * torch.inf})
    with pytest.raises(
        UserError, match=rf"in: x\.safetensors: {KOHYA}\.lora_up\.weight has values that are NaN or inf"
    ):
        read_lora(file, "in")


@pytest.mark.parametrize(
    "content",
    ["7", '{"unet.alpha_pattern": 3}', '{"unet.lora_alpha": "x"}', '{"unet.lora_alpha": NaN}', "{", "[" * 99999],
)
def test_metadata_that_diffusers_does_not_write_are_named(content: str, tmp_path: Path) -> None:
    file = saved(tmp_path / "x.safetensors", GOOD, {"lora_adapter_metadata": content})
    with pytest.raises(UserError, match="its lora_adapter_metadata"):
        read_lora(file, "in")


def test_patterns_of_alpha_are_names_and_no_expressions(tmp_path: Path) -> None:
    """Expressions of a stranger could take for ever."""
    stated = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"(a+)+$": 3, "attn1.to_q": 4, "o_q": 5}}
    file = saved(tmp_path / "x.safetensors", GOOD, {"lora_adapter_metadata": json.dumps(stated)})
    assert read_lora(file, "in").layers[LAYER].alpha == 4


def test_what_is_beside_the_weights_is_left_out_with_one_warning(nano_file: Path, tmp_path: Path) -> None:
    extras = ["model_ema.decay", "model_ema.diffusion_modelinput_blocks", "betas", "alphas_cumprod", "model.sqrt_recip"]
    extras += ["conditioner.embedders.0.transformer.text_projection.weight", "first_stage_model.loss.logvar"]
    file = saved(tmp_path / "x.safetensors", load_file(nano_file) | {name: torch.ones(2) for name in extras})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        checkpoint = open_checkpoint("in", file)
    assert checkpoint.unknown == []
    (warning,) = (str(one.message) for one in seen if "leaves out" in str(one.message))
    assert "and 6 more" in warning
    assert checkpoint.weights.keys() == open_checkpoint("in", nano_file).weights.keys()


def test_nan_in_a_model_is_named_when_it_is_loaded(nano_file: Path, tmp_path: Path) -> None:
    tensors = load_file(nano_file)
    tensors["model.diffusion_model.out.2.bias"][1] = torch.nan
    file = saved(tmp_path / "nan.safetensors", tensors)
    with pytest.raises(
        UserError, match=r"model\.weights=.*nan\.safetensors: unet/conv_out\.bias has values that are NaN"
    ):
        pretrained(str(file))


def test_a_layer_that_its_neighbours_have_is_missed(tmp_path: Path) -> None:
    others = ("unet/conv_in.weight", "vae/quant_conv.weight", "text_encoder_2/text_projection.weight")
    layers = [
        f"text_encoder/text_model.encoder.layers.{i}.{leaf}" for i in range(4) for leaf in ("fc1.bias", "fc2.bias")
    ]

    def refuse_without(*missing: str) -> None:
        names = [name for name in (*others, *layers) if not name.startswith(missing or "nothing")]
        view = WeightView("F32", (1,), StoredTensor("F32", (1,), tmp_path, "x"))
        refuse_incomplete("in", Checkpoint(tmp_path, dict.fromkeys(names, view), [], {}))

    refuse_without()
    with pytest.raises(UserError, match=r"in: has no VAE; pass"):
        refuse_without("vae/")
    with pytest.raises(
        UserError, match=r"in: is incomplete, it lacks text_encoder/.*layers\.2\.fc1\.bias; get it again"
    ):
        refuse_without(layers[4])
    with pytest.raises(UserError, match=r"in: is incomplete, it lacks text_encoder/.*layers\.1; get it again"):
        refuse_without(layers[2], layers[3])
    refuse_without(*layers[:6])  # an excerpt of a few layers is another thing


def test_all_subjects_are_checked(nano_file: Path, tmp_path: Path) -> None:
    bad = saved(tmp_path / "bad.safetensors", GOOD | {f"{KOHYA}.lora_up.weight": UP * torch.nan})
    tensors = load_file(nano_file)
    tensors["model.diffusion_model.out.2.bias"][1] = torch.nan
    nan = saved(tmp_path / "nan.safetensors", tensors)

    def load(**_: Any) -> Any:
        raise AssertionError("nothing is loaded yet")

    loader = SubjectLoader(load, "nano", torch.device("cpu"))
    base, lora, model = read_subjects({"base": "nano", "lora": str(bad), "model": str(nan)})
    loader.check(base)
    for subject in (lora, model):
        with pytest.raises(UserError, match=rf"subjects\.{subject.name}=.* has values that are NaN"):
            loader.check(subject)


def test_a_file_that_does_not_exist_is_called_so(tmp_path: Path, monkeypatch, capsys) -> None:
    for to in ("kohya", "folder", "single_file"):
        monkeypatch.setattr(
            sys, "argv", ["sdft-formats", f"in={tmp_path}/x.safetensors", f"out={tmp_path}/y", f"to={to}"]
        )
        with pytest.raises(SystemExit):
            formats.main()
        assert capsys.readouterr().err == f"error: in={tmp_path}/x.safetensors: there is no such file or folder\n"


@pytest.mark.parametrize("content", ["", "[1]", "7", "{", "\0\x80", "[" * 99999])
def test_json_of_others_is_an_object_or_one_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_bytes(content.encode("latin-1"))
    for read in (lambda: read_json(tmp_path / "summary.json"), lambda: read_run_outputs(tmp_path)):
        with pytest.raises(UserError, match=r"summary\.json: (is not valid JSON|must hold a JSON object)") as refused:
            read()
        assert "\n" not in str(refused.value)


def test_artifacts_of_a_summary_are_names_and_paths(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"artifacts": {"lora": 3}}')
    with pytest.raises(UserError, match=r"summary\.json: its artifacts are not names and paths"):
        read_run_outputs(tmp_path)
