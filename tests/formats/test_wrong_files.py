"""Bad input to `python -m sdft.formats`: one line with the error and the remedy; nothing is overwritten."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdft.formats.convert import convert
from sdft.formats.keys import PREFIXES
from sdft.models.load import NANO

UNET, SECOND = PREFIXES["unet"], PREFIXES["text_encoder_2"]
KEPT = b"what was here before"


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    return convert(str(NANO), str(tmp_path_factory.mktemp("nano") / "nano.safetensors"), "single_file", NANO)


def file_of(tmp_path: Path, *names: str) -> Path:
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def changed(single: Path, tmp_path: Path, change: Callable[[dict], object]) -> Path:
    tensors = load_file(single)
    change(tensors)
    save_file(tensors, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def truncated(single: Path, tmp_path: Path) -> Path:
    (tmp_path / "in.safetensors").write_bytes(single.read_bytes()[:-1000])
    return tmp_path / "in.safetensors"


def text_file(single: Path, tmp_path: Path) -> Path:
    (tmp_path / "in.safetensors").write_text("404: not found")
    return tmp_path / "in.safetensors"


def empty_file(single: Path, tmp_path: Path) -> Path:
    (tmp_path / "in.safetensors").touch()
    return tmp_path / "in.safetensors"


def pickle_file(single: Path, tmp_path: Path) -> Path:
    torch.save({"state_dict": load_file(single)}, tmp_path / "in.ckpt")
    return tmp_path / "in.ckpt"


def plain_folder(single: Path, tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def other_pipeline(single: Path, tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    return tmp_path / "in"


def folder_without_weights(single: Path, tmp_path: Path) -> Path:
    (tmp_path / "in" / "unet").mkdir(parents=True)
    (tmp_path / "in" / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    return tmp_path / "in"


SD1_LORA = "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"
SDXL_LORA = "lora_unet_input_blocks_4_1_proj_in"
FILES: dict[str, tuple[Callable[[Path, Path], Path], str, list[str]]] = {
    "cut off": (truncated, "folder", ["in=", "truncated", "get it again"]),
    "a web page": (text_file, "folder", ["in=", "not a safetensors file"]),
    "empty": (empty_file, "folder", ["in=", "not a safetensors file"]),
    "a pickle": (pickle_file, "single_file", ["in=", "a pickle can run code", "allow_pickle=true"]),
    "a folder of something else": (plain_folder, "single_file", ["in=", "model_index.json"]),
    "another pipeline": (other_pipeline, "single_file", ["in=", "FluxPipeline", "not Stable Diffusion XL"]),
    "a folder without weights": (folder_without_weights, "single_file", ["in=", "unet", "no .safetensors file"]),
    "Stable Diffusion 1": (
        lambda _, p: file_of(p, f"{UNET}input_blocks.0.0.weight", "cond_stage_model.transformer.x"),
        "folder",
        ["in=", "Stable Diffusion 1", "pass a whole SDXL checkpoint"],
    ),
    "Flux": (lambda _, p: file_of(p, "double_blocks.0.img_attn.qkv.weight"), "folder", ["in=", "Flux"]),
    "a refiner": (
        lambda _, p: file_of(p, f"{UNET}label_emb.0.0.weight", "conditioner.embedders.0.model.ln_final.weight"),
        "folder",
        ["in=", "refiner"],
    ),
    "a UNet alone": (lambda _, p: file_of(p, f"{UNET}out.2.weight"), "folder", ["in=", "without SDXL's text encoders"]),
    "unknown tensors": (lambda _, p: file_of(p, "layer.0.weight"), "folder", ["in=", "'layer.0.weight'"]),
    "a missing tensor": (
        lambda s, p: changed(s, p, lambda t: t.pop(f"{SECOND}text_projection")),
        "folder",
        ["in=", "missing: text_encoder_2/text_projection.weight"],
    ),
    "one tensor too many": (
        lambda s, p: changed(s, p, lambda t: t.update({f"{UNET}control.weight": torch.zeros(1)})),
        "folder",
        ["in=", f"unexpected: {UNET}control.weight"],
    ),
    "quantised weights": (
        lambda s, p: changed(s, p, lambda t: t.update({f"{UNET}out.2.bias": torch.zeros(4, dtype=torch.int8)})),
        "folder",
        ["in=", "I8", "fp16, bf16 or fp32"],
    ),
    "an SD1.5 LoRA": (lambda _, p: file_of(p, SD1_LORA), "diffusers", ["in=", "Stable Diffusion 1"]),
    "a LoRA as a model": (
        lambda _, p: file_of(p, f"{SDXL_LORA}.lora_down.weight", f"{SDXL_LORA}.lora_up.weight"),
        "folder",
        ["to=folder", "LoRA", "merging"],
    ),
    "half a LoRA": (lambda _, p: file_of(p, f"{SDXL_LORA}.lora_down.weight"), "diffusers", ["in=", "lora_up"]),
    "a model as a LoRA": (lambda s, p: s, "kohya", ["to=kohya", "whole model"]),
    "nothing there": (lambda _, p: p / "no.safetensors", "folder", ["in=", "no such file"]),
}
WORDS = {
    "an unknown format": (["to=onnx"], ["to=onnx", "single_file"]),
    "an unknown dtype": (["to=folder", "dtype=int8"], ["dtype=int8", "bf16"]),
    "a folder named like a file": (["to=folder", "out={tmp}/out.safetensors"], ["out=", "folder"]),
    "a file named like a folder": (["to=single_file", "out={tmp}/model"], ["out=", ".safetensors"]),
    "an existing target": (["to=single_file", "out={tmp}/there.safetensors"], ["exists already", "overwrite=true"]),
    "an unwritable target": (["to=single_file", "out=/proc/x/model.safetensors"], ["out=", "cannot be written"]),
    "a target in the source": (["in={nano}", "to=folder", "out={nano}/model"], ["out=", "another path"]),
    "no such config": (["to=folder", "config=/no/such/folder"], ["config=/no/such/folder", "config=FOLDER"]),
    "a misspelt key": (["to=folder", "dtyp=fp16"], ["dtyp", "dtype"]),
    "no format": ([], ["to"]),
    "a word where yes or no is asked": (["to=folder", "overwrite=perhaps"], ["overwrite=perhaps", "true or false"]),
}


def fails(words: list[str], parts: list[str], monkeypatch, capsys) -> str:
    main = importlib.import_module("sdft.formats.__main__").main
    monkeypatch.setattr("sys.argv", ["sdft.formats", *words])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    message = error[error.index("error: ") :]
    for part in parts:
        assert part in message
    return message


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_is_named_and_nothing_is_written(case: str, single: Path, tmp_path, monkeypatch, capsys) -> None:
    make, to, parts = FILES[case]
    source = make(single, tmp_path)
    out = tmp_path / ("out" if to == "folder" else "out.safetensors")
    before = sorted(os.listdir(tmp_path))
    fails([f"in={source}", f"out={out}", f"to={to}", "config=nano"], parts, monkeypatch, capsys)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("case", WORDS)
def test_a_bad_command_is_answered_and_nothing_is_lost(case: str, single: Path, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "there.safetensors").write_bytes(KEPT)
    words, parts = WORDS[case]
    words = [word.format(tmp=tmp_path, nano=NANO) for word in words]
    given = {word.partition("=")[0] for word in words}
    usual = {"in": str(single), "out": str(tmp_path / "out"), "config": "nano"}
    words += [f"{key}={value}" for key, value in usual.items() if key not in given]
    fails(words, parts, monkeypatch, capsys)
    assert os.listdir(tmp_path) == ["there.safetensors"]
    assert (tmp_path / "there.safetensors").read_bytes() == KEPT
    assert not (NANO / "model").exists()
