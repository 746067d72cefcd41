"""The export guard: what a run writes is read back by diffusers and compared, and a wrong file stops the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import slow, trained_module
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdft.errors import UserError
from sdft.evaluation.export_check import scale_error
from sdft.formats import lora_file
from sdft.formats.lora_layer import DOWN, UP, Layer
from sdft.models.load import pretrained
from sdft.training.callbacks import export as exports
from sdft.training.callbacks.export import Export
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full

UNET, ENCODERS = ["unet"], ["unet", "text_encoder", "text_encoder_2"]


def trained(tuning, dtype: dict[str, str] | None = None) -> SimpleNamespace:
    return trained_module(pretrained("nano", dtype=dtype), tuning)


def export(module, folder: Path, **options) -> tuple[dict, dict]:
    return Export(**options)(module, folder, "test", 64)


@pytest.mark.parametrize("parts", [UNET, slow(ENCODERS)], ids=["unet", "encoders"])
@pytest.mark.parametrize("method", ["lora", slow("dora")])
def test_both_files_of_a_lora_give_the_trained_model_back(method: str, parts: list[str], tmp_path: Path) -> None:
    written, errors = export(trained(Adapter(rank=4, alpha=11, parts=parts, method=method)), tmp_path)
    assert set(written) == {"lora", "lora_kohya"}
    assert set(errors) == {"export_error/lora", "export_error/lora_kohya"}
    assert 0 < max(errors.values()) < 0.01


RANKS = {"unet.down_blocks.*": 2, "*.to_q": 8}
MENU: dict[str, dict[str, Any]] = {
    "ranks": {"rank_pattern": RANKS},
    "ranks, one alpha": {"rank_pattern": RANKS, "alpha": 3.0},
    "alphas": {"alpha_pattern": {"*.to_q": 16.0}},
    "rslora": {"rank_pattern": RANKS, "rslora": True},
    "conv": {"layers": "conv", "conv_rank": 2, "conv_alpha": 1.0},
    "dora": {"method": "dora", "rank_pattern": RANKS},
    "pissa": {"init": "pissa", "rank_pattern": RANKS},
    "olora": {"init": "olora", "alpha": 2.0},
}


@pytest.mark.parametrize("parts", [UNET, slow(ENCODERS)], ids=["unet", "encoders"])
@pytest.mark.parametrize("name", ["ranks", *map(slow, [*MENU][1:])])
def test_ranks_and_scales_of_single_layers_are_read_back(name: str, parts: list[str], tmp_path: Path) -> None:
    """diffusers ignores the alphas of single layers of a kohya file."""
    written, errors = export(trained(Adapter(rank=4, parts=parts, **MENU[name])), tmp_path)
    assert set(written) == {"lora", "lora_kohya"}
    assert 0 < max(errors.values()) < 0.01


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_what_diffusers_has_no_form_for_is_written_for_the_others(method: str, tmp_path: Path) -> None:
    written, errors = export(trained(Adapter(rank=4, alpha=11, parts=UNET, method=method)), tmp_path)
    assert set(written) == {"lora_kohya"}
    assert 0 < errors["export_error/lora_kohya"] < 0.02


@pytest.mark.parametrize(
    "options", [{"method": "oft"}, {"method": "boft"}, {"train_norms": True, "train_biases": True}], ids=str
)
def test_rotations_norms_and_biases_are_read_back(options: dict, tmp_path: Path) -> None:
    written, errors = export(trained(Adapter(rank=10, parts=ENCODERS, **options)), tmp_path)
    assert set(written) == {"lora_kohya"}
    assert 0 < errors["export_error/lora_kohya"] < 0.01


@pytest.mark.parametrize("lost", ["w_norm", "diff_b"])
def test_a_norm_or_bias_that_is_not_written_fails_the_export(lost: str, tmp_path: Path, monkeypatch) -> None:
    def writes_wrong(lora, path, layout, *args):
        lora_file.write_lora_file(lora, path, layout, *args)
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith(lost))
        save_file(tensors | {name: 1.1 * tensors[name]}, path)

    monkeypatch.setattr(exports, "write_lora_file", writes_wrong)
    with pytest.raises(UserError, match=r"deviates from the trained model by 10\.0% of what training changed"):
        export(trained(Adapter(rank=2, parts=UNET, train_norms=True, train_biases=True)), tmp_path)


@pytest.mark.slow
def test_new_words_are_read_back_with_the_lora(tmp_path: Path) -> None:
    tuning = Adapter(rank=4, parts=ENCODERS, new_words={"blorp": "a red cat"})
    written, errors = export(trained(tuning), tmp_path)
    assert set(written) == {"lora", "lora_kohya", "words"}
    assert 0 < max(errors.values()) < 0.01


@pytest.mark.slow
def test_a_frozen_base_in_bf16_stays_so_and_is_compared_in_fp32(tmp_path: Path) -> None:
    module = trained(Adapter(rank=4, parts=UNET), {"unet": "bf16"})
    assert {p.dtype for p in module.model.unet.parameters() if p.requires_grad} == {torch.float32}
    _, errors = export(module, tmp_path)
    assert max(errors.values()) < 0.002
    assert module.model.unet.conv_in.weight.dtype == torch.bfloat16
    assert {p.dtype for p in module.model.unet.parameters() if p.requires_grad} == {torch.float32}


def test_a_whole_model_as_folder_and_as_one_file(tmp_path: Path) -> None:
    written, errors = export(trained(Full()), tmp_path, single_file=True)
    assert set(written) == {"model", "single_file"}
    assert max(errors.values()) < 1e-5
    with safe_open(written["single_file"], framework="pt") as file:
        assert file.metadata()["modelspec.title"] == "test"
        assert file.metadata()["modelspec.resolution"] == "64x64"


def test_a_whole_model_in_fp16_is_only_rounded(tmp_path: Path) -> None:
    _, errors = export(trained(Full()), tmp_path, dtype="fp16")
    assert 0 < errors["export_error/model"] < 0.02


@pytest.mark.slow
def test_the_files_say_what_they_are(tmp_path: Path) -> None:
    tuning = Adapter(rank=4, alpha=2, parts=ENCODERS, new_words={"blorp": "a red cat"})
    written, _ = export(trained(tuning), tmp_path)
    for name in ("lora", "lora_kohya"):
        with safe_open(written[name], framework="pt") as file:
            metadata = file.metadata()
        assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
        assert metadata["modelspec.trigger_phrase"] == "blorp"
        assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
        assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2")
        assert metadata["ss_network_module"] == "networks.lora"


@pytest.mark.slow
def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    written, _ = export(trained(Adapter(rank=2, parts=UNET)), tmp_path)
    modes = {path.stat().st_mode & 0o777 for path in written.values()}
    (tmp_path / "plain").touch()
    assert modes == {(tmp_path / "plain").stat().st_mode & 0o777}


def wrong_alpha(path: Path) -> None:
    tensors = load_file(path)
    for name in tensors:
        if name.endswith(".alpha"):
            tensors[name] = tensors[name] * 2
    save_file(tensors, path)


def one_layer_lost(path: Path) -> None:
    lost = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_v"
    save_file({name: t for name, t in load_file(path).items() if not name.startswith(f"{lost}.")}, path)


def queries_for_values(path: Path) -> None:
    """What a wrong line in a table of names would do."""
    tensors = load_file(path)
    for name in [name for name in tensors if "attn1_to_q.lora_up" in name]:
        other = name.replace("to_q", "to_v")
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
    save_file(tensors, path)


@pytest.mark.parametrize("spoil", [slow(wrong_alpha), one_layer_lost, slow(queries_for_values)])
def test_a_file_that_is_wrong_fails_the_export(spoil: Callable, tmp_path: Path, monkeypatch) -> None:
    def writes_wrong(lora, path, layout, *args):
        lora_file.write_lora_file(lora, path, layout, *args)
        if layout == "kohya":
            spoil(path)

    monkeypatch.setattr(exports, "write_lora_file", writes_wrong)
    with pytest.raises(UserError, match=r"lora_kohya\.safetensors deviates .*%.*do not use it"):
        export(trained(Adapter(rank=4, alpha=11, parts=UNET)), tmp_path)


@pytest.mark.slow
def test_a_single_file_with_a_forgotten_transpose_fails_the_export(tmp_path: Path, monkeypatch) -> None:
    name = "conditioner.embedders.1.model.text_projection"

    def forgets(checkpoint, path, **options):
        from sdft.formats.single_file import write_single_file

        write_single_file(checkpoint, path, **options)
        tensors = load_file(path)
        save_file(tensors | {name: tensors[name].T.contiguous()}, path)

    monkeypatch.setattr(exports, "write_single_file", forgets)
    with pytest.raises(UserError, match=r"model\.safetensors deviates .*do not use it"):
        export(trained(Full()), tmp_path, single_file=True)


def test_a_short_training_of_which_fp16_leaves_few_digits_is_no_wrong_scale() -> None:
    """Values near the smallest that fp16 has, 6e-8; a wrong alpha is found there too."""
    up, down = torch.full((8, 2), 9e-8), torch.ones(2, 8)
    trained = Layer({UP: up, DOWN: down}, 4.0)
    read = Layer({UP: (up * 2).half(), DOWN: down.half()}, 2.0)
    assert scale_error(read, trained) == 0
    assert scale_error(Layer(read.tensors, 4.0), trained) > 0.2
    assert scale_error(Layer({**read.tensors, UP: 3 * up.half()}, 2.0), trained) > 0.2
    assert scale_error(Layer({**read.tensors, UP: 0 * up}, 2.0), trained) == 1
    assert scale_error(Layer(read.tensors, 0.0), trained) > 0.9
