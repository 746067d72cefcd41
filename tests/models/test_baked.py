"""`model.loras`: LoRAs that are in the weights before anything trains, in fp32 and before dtypes and quantisation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.synthetic import Synthetic
from sdft.errors import UserError
from sdft.formats.baked import BASE_KEY, open_loras
from sdft.formats.lora_file import write_lora_file
from sdft.formats.lora_layer import DORA, DOWN, UP, Layer, LoraFile
from sdft.merging import methods
from sdft.merging.merge import merge
from sdft.merging.recipe import Step
from sdft.models.load import pretrained, pretrained_on_meta
from sdft.models.quantized import quantize, quantized_layers

LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "mid_block.resnets.0.conv1"


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def low_rank(weight: Tensor, seed: int, alpha: float = 4.0, rank: int = 2) -> Layer:
    rows, columns, *kernel = weight.shape
    up, down = random(rows, rank, *[1] * len(kernel), seed=seed), random(rank, columns, *kernel, seed=seed + 1)
    return Layer({UP: up, DOWN: down}, alpha)


def write(path: Path, layers: dict[str, Layer], **metadata: str) -> str:
    write_lora_file(
        LoraFile({f"unet/{name}": layer for name, layer in layers.items()}), path, "kohya", torch.float32, metadata
    )
    return str(path)


@pytest.fixture(scope="module")
def base():
    return pretrained("nano")


def weight_of(model, name: str) -> Tensor:
    return model.unet.get_submodule(name).weight.detach()


def test_two_loras_by_hand_and_nothing_else_changes(base, tmp_path: Path) -> None:
    """W + 0.5 (4 / 2) up_a down_a - 1 (4 / 2) up_b down_b, and all other weights to the bit."""
    w = weight_of(base, LINEAR)
    a, b = low_rank(w, 0), low_rank(w, 2)
    files = [write(tmp_path / f"{i}.safetensors", {LINEAR: layer}) for i, layer in enumerate((a, b))]
    model = pretrained("nano", loras=[{"lora": files[0], "scale": 0.5}, {"lora": files[1], "scale": -1.0}])
    expected = w + 0.5 * 2 * a.tensors[UP] @ a.tensors[DOWN] - 2 * b.tensors[UP] @ b.tensors[DOWN]
    assert torch.allclose(weight_of(model, LINEAR), expected, atol=1e-6)
    assert not torch.allclose(w, expected, atol=1e-3)
    before = base.state_dict()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == [f"unet.{LINEAR}.weight"]
    assert [(one["lora"], one["scale"]) for one in model.baked] == [("0.safetensors", 0.5), ("1.safetensors", -1.0)]
    assert pretrained("nano", loras=[{"lora": files[0], "scale": 0.0}]).baked == []


@pytest.mark.parametrize("kind", ["lora", "dora", "locon", "loha"])
def test_it_is_what_merging_bakes(kind: str, base, tmp_path: Path) -> None:
    name = CONV if kind == "locon" else LINEAR
    w = weight_of(base, name)
    layer = low_rank(w, 0)
    if kind == "dora":
        layer = Layer({**layer.tensors, DORA: random(len(w), 1, seed=9).abs() + 1}, 4.0)
    if kind == "loha":
        shapes = {"a": (len(w), 3), "b": (3, w.shape[1])}
        layer = Layer({f"hada_w{i}_{x}": random(*shapes[x], seed=i) for i in (1, 2) for x in "ab"}, 1.5)
    file, out = write(tmp_path / "lora.safetensors", {name: layer}), tmp_path / "merged"
    list(merge({"merged": Step(methods.add, {"base": "nano", "delta": file}, {"scale": 0.7})}, str(out), dtype="fp32"))
    model, merged = pretrained("nano", loras=[{"lora": file, "scale": 0.7}]), pretrained(str(out))
    assert torch.allclose(weight_of(model, name), weight_of(merged, name), atol=1e-6)
    assert not torch.allclose(weight_of(model, name), w, atol=1e-3)


def test_dtypes_and_quantisation_come_after(base, tmp_path: Path) -> None:
    w = weight_of(base, LINEAR)
    file = write(tmp_path / "lora.safetensors", {LINEAR: low_rank(w, 0)})
    loras = [{"lora": file, "scale": 1.0}]
    baked = weight_of(pretrained("nano", loras=loras), LINEAR)
    narrow = pretrained("nano", loras=loras, dtype={"unet": "bf16"})
    assert torch.equal(weight_of(narrow, LINEAR), baked.bfloat16())
    small = pretrained("nano", loras=loras, quantization={"unet": "int8"})
    layers = dict(quantized_layers(small))
    codes, scales = quantize(baked, "int8")
    assert torch.equal(layers[f"unet.{LINEAR}"].codes, codes)
    assert torch.equal(layers[f"unet.{LINEAR}"].scales, scales)
    with small.original_weights().opened() as read:  # with which the export compares
        assert torch.equal(read(f"unet/{LINEAR}.weight"), baked)


def test_a_lora_for_v_makes_a_model_for_v(base, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", {LINEAR: low_rank(weight_of(base, LINEAR), 0)},
                 **{"modelspec.prediction_type": "v"})  # fmt: skip
    assert base.scheduler.config.prediction_type == "epsilon"
    assert pretrained("nano", loras=[{"lora": file}]).scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize("load", [pretrained, pretrained_on_meta])
def test_what_does_not_fit_is_named(load, base, tmp_path: Path) -> None:
    other = write(tmp_path / "other.safetensors", {LINEAR: low_rank(torch.zeros(6, 4), 0)})
    deeper = LINEAR.replace("transformer_blocks.0", "transformer_blocks.1")
    missing = write(tmp_path / "deep.safetensors", {deeper: low_rank(torch.zeros(6, 4), 0)})
    with pytest.raises(UserError, match=r"model\.loras: .*other\.safetensors does not fit .*changes 6 x 4 weights"):
        load("nano", loras=[{"lora": other}])
    with pytest.raises(UserError, match=r"model\.loras: .*deep\.safetensors does not fit .*is missing in the model"):
        load("nano", loras=[{"lora": missing}])
    with pytest.raises(UserError, match=r"model\.loras\[0\]\.lora=.*nowhere"):
        load("nano", loras=[{"lora": str(tmp_path / "nowhere.safetensors")}])
    with pytest.raises(UserError, match=r"model\.loras\[1\] has no file"):
        load("nano", loras=[{"lora": other}, {"scale": 1.0}])


def run_folder(folder: Path, lora: str, **more: str) -> Path:
    folder.mkdir()
    (folder / "lora.safetensors").write_bytes(Path(lora).read_bytes())
    artifacts = {"lora": "lora.safetensors", **more}
    (folder / "summary.json").write_text(json.dumps({"name": "run", "artifacts": artifacts}))
    return folder


def test_a_run_folder_stands_for_its_lora(base, tmp_path: Path) -> None:
    file = write(tmp_path / "lora.safetensors", {LINEAR: low_rank(weight_of(base, LINEAR), 0)})
    (found,) = open_loras([{"lora": str(run_folder(tmp_path / "run", file))}])
    assert found.path == tmp_path / "run" / "lora.safetensors"
    with pytest.raises(UserError, match=r"new words, which its LoRA does not hold; pass .*lora\.safetensors to"):
        open_loras([{"lora": str(run_folder(tmp_path / "word", file, words="words.safetensors"))}])
    with pytest.raises(UserError, match="no finished run with a LoRA"):
        open_loras([{"lora": str(tmp_path)}])


def test_the_real_models_names(thin_sdxl: Synthetic, tmp_path: Path) -> None:
    """A LoRA of the UNet and of both text encoders on SDXL's own names."""
    plain = pretrained(str(thin_sdxl.weights), str(thin_sdxl.config))
    names = {
        "unet": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "text_encoder": "encoder.layers.0.self_attn.q_proj",
        "text_encoder_2": "encoder.layers.0.self_attn.q_proj",
    }
    layers, expected = {}, {}
    for part, suffix in names.items():
        (name,) = [n for n, _ in plain.get_submodule(part).named_modules() if n.endswith(suffix)]
        w = plain.get_submodule(part).get_submodule(name).weight.detach()
        stored = f"text_model.{suffix}" if part != "unet" else suffix
        layers[f"{part}/{stored}"] = layer = low_rank(w, 0)
        expected[f"{part}.{name}.weight"] = w.float() + 2 * layer.tensors[UP] @ layer.tensors[DOWN]
    file = tmp_path / "lora.safetensors"
    write_lora_file(LoraFile(layers), file, "kohya", torch.float32)
    model = pretrained(str(thin_sdxl.weights), str(thin_sdxl.config), loras=[{"lora": str(file)}])
    for name, value in expected.items():
        assert torch.allclose(model.get_parameter(name), value, atol=1e-5), name
    assert BASE_KEY == "sdft.base_loras"
