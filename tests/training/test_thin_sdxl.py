"""The export guard and the memory of a run on a thin SDXL: every tensor and name of the real one, narrow."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from checks import slow, trained_module
from safetensors.torch import load_file, save_file

from benchmarks.synthetic import Synthetic
from sdft.errors import UserError
from sdft.formats import lora_file
from sdft.formats.architecture import empty_network, parameter_names
from sdft.models.load import SDXL_BASE, pretrained
from sdft.training.callbacks import export as exports
from sdft.training.callbacks.export import Export
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full

BF16 = {"unet": "bf16", "text_encoder": "bf16", "text_encoder_2": "bf16"}
LAYER = "lora_unet_input_blocks_8_1_transformer_blocks_7_attn1_to_q"


def trained(thin: Synthetic, tuning, dtype: dict[str, str] | None = None) -> SimpleNamespace:
    return trained_module(pretrained(str(thin.weights), config=str(thin.config), dtype=dtype), tuning)


def test_it_has_the_topology_and_the_names_of_sdxl(thin_sdxl: Synthetic) -> None:
    counts = {}
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        names = parameter_names(part, empty_network(part, thin_sdxl.config / part))
        assert names == parameter_names(part, empty_network(part, SDXL_BASE / part))
        counts[part] = len(names)
    assert counts == {"unet": 1680, "text_encoder": 196, "text_encoder_2": 517, "vae": 248}


@pytest.mark.parametrize(
    "parts", [["unet"], slow(["unet", "text_encoder", "text_encoder_2"])], ids=["unet", "encoders"]
)
def test_both_files_of_a_lora_give_the_trained_layers_back(parts: list[str], thin_sdxl: Synthetic, tmp_path) -> None:
    written, errors = Export()(trained(thin_sdxl, Adapter(4, 11, parts), BF16), tmp_path, "test", 1024)
    assert set(written) == {"lora", "lora_kohya"}
    assert 0 < max(errors.values()) < 0.002


def wrong_alpha(path: Path) -> None:
    tensors = load_file(path)
    save_file(tensors | {f"{LAYER}.alpha": tensors[f"{LAYER}.alpha"] * 2}, path)


def one_layer_lost(path: Path) -> None:
    save_file({name: t for name, t in load_file(path).items() if not name.startswith(f"{LAYER}.")}, path)


def query_for_value(path: Path) -> None:
    tensors = load_file(path)
    one, other = (f"{LAYER.replace('to_q', name)}.lora_up.weight" for name in ("to_q", "to_v"))
    save_file(tensors | {one: tensors[other].clone(), other: tensors[one].clone()}, path)


@pytest.mark.parametrize("spoil", [wrong_alpha, one_layer_lost, query_for_value])
def test_one_wrong_layer_of_722_fails_the_export(spoil: Callable, thin_sdxl: Synthetic, tmp_path, monkeypatch) -> None:
    def writes_wrong(lora, path, layout, *args):
        lora_file.write_lora_file(lora, path, layout, *args)
        if layout == "kohya":
            assert len(lora.layers) == 722
            spoil(path)

    monkeypatch.setattr(exports, "write_lora_file", writes_wrong)
    with pytest.raises(UserError, match=r"lora_kohya\.safetensors deviates .*%.*do not use it"):
        Export()(trained(thin_sdxl, Adapter(4, 11, ["unet"])), tmp_path, "test", 1024)


def forgotten_transpose(tensors: dict) -> dict:
    name = "conditioner.embedders.1.model.text_projection"
    return {name: tensors[name].T.contiguous()}


def one_weight_wrong(tensors: dict) -> dict:
    name = "model.diffusion_model.output_blocks.2.1.transformer_blocks.3.ff.net.2.bias"
    return {name: tensors[name] + 0.1}


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [forgotten_transpose, one_weight_wrong])
def test_one_wrong_tensor_of_a_file_fails_the_export(
    spoil: Callable, thin_sdxl: Synthetic, tmp_path, monkeypatch
) -> None:
    def forgets(checkpoint, path, **options):
        from sdft.formats.single_file import write_single_file

        write_single_file(checkpoint, path, **options)
        tensors = load_file(path)
        save_file(tensors | spoil(tensors), path)

    monkeypatch.setattr(exports, "write_single_file", forgets)
    with pytest.raises(UserError, match=r"model\.safetensors deviates .*do not use it"):
        Export(single_file=True)(trained(thin_sdxl, Full(["unet"])), tmp_path, "test", 1024)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_whole_model_is_read_back(dtype: str, thin_sdxl: Synthetic, tmp_path: Path) -> None:
    module = trained(thin_sdxl, Full(["unet", "text_encoder_2"]))
    written, errors = Export(dtype, single_file=True)(module, tmp_path, "test", 1024)
    assert set(written) == {"model", "single_file"}
    assert max(errors.values()) < (1e-6 if dtype == "fp32" else 0.1)


def test_a_lost_config_entry_fails_the_export(thin_sdxl: Synthetic, tmp_path: Path, monkeypatch) -> None:
    """Weights alone do not make the model: heads are not seen in any shape."""

    def forgets(model, folder, dtype):
        from sdft.formats.diffusers_folder import write_folder, write_json
        from sdft.formats.json_file import read_json

        write_folder(model, folder, dtype)
        file = folder / "unet" / "config.json"
        write_json(file, read_json(file) | {"attention_head_dim": [1, 2, 4]})

    monkeypatch.setattr(exports, "write_folder", forgets)
    with pytest.raises(UserError, match=r"unet says attention_head_dim=\[1, 2, 4\], not \[5, 10, 20\]; do not use it"):
        Export()(trained(thin_sdxl, Full(["unet"])), tmp_path, "test", 1024)


def peak_growth(action: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process grew at most during a call."""

    def status(name: str) -> int:
        rows = Path("/proc/self/status").read_text().splitlines()
        return next(int(row.split()[1]) for row in rows if row.startswith(name)) * 2**10

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    action()
    return status("VmHWM") - before


@pytest.mark.parametrize("tuning", [Adapter(4, 11, ["unet"]), slow(Full(["unet"]))], ids=["lora", "full"])
def test_the_guard_takes_less_than_half_of_the_largest_part(tuning, thin_sdxl: Synthetic, tmp_path: Path) -> None:
    module, guard = trained(thin_sdxl, tuning), Export()
    half = sum(p.nbytes for p in module.model.unet.parameters()) / 2
    # The vocabulary is as long as in the real model: text encoder 2 is not as narrow as the rest.
    half += module.model.text_encoder_2.get_input_embeddings().weight.nbytes
    guard(module, tmp_path, "test", 1024)  # imports
    assert peak_growth(lambda: guard(module, tmp_path, "test", 1024)) < half


def test_loading_holds_no_second_copy(thin_sdxl: Synthetic) -> None:
    def load():
        return pretrained(
            str(thin_sdxl.weights), config=str(thin_sdxl.config), dtype=dict.fromkeys([*BF16, "vae"], "bf16")
        )

    size = sum(p.nbytes for p in load().parameters())
    assert peak_growth(load) < 1.25 * size
