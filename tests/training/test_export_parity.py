"""The export guard: what a run writes is read back by diffusers and compared, and a wrong file stops the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checks import slow, trained_module
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdft.errors import UserError
from sdft.formats import lora_file
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


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_what_diffusers_has_no_form_for_is_written_for_the_others(method: str, tmp_path: Path) -> None:
    written, errors = export(trained(Adapter(rank=4, alpha=11, parts=UNET, method=method)), tmp_path)
    assert set(written) == {"lora_kohya"}
    assert 0 < errors["export_error/lora_kohya"] < 0.02


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
