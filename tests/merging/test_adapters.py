"""LoRAs of every kind into models and out of them: against peft's own arithmetic and the optimum of linear algebra."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from small_models import LAYER, LONG, SHAPES, read, tensors_of
from torch import Tensor

from sdft import rng
from sdft.errors import UserError
from sdft.formats.adapter import applied_lora
from sdft.formats.lora_delta import lora_delta
from sdft.formats.lora_file import read_lora, write_lora_file
from sdft.formats.lora_layer import DORA, DOWN, MID, UP, Layer, LoraFile
from sdft.merging import methods
from sdft.merging.low_rank import best_low_rank, best_low_rank_of_sum
from sdft.merging.merge import merge
from sdft.merging.recipe import Step
from sdft.models.load import pretrained

Model = Callable[..., Path]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def layers_for(rows: int, columns: int) -> dict[str, Layer]:
    """One layer of each kind for a matrix; rows and columns are multiples of 4."""
    up, down = random(rows, 2), random(2, columns, seed=1)
    loha = {f"hada_w{i}_a": random(rows, 3, seed=2 * i) for i in (1, 2)}
    loha |= {f"hada_w{i}_b": random(3, columns, seed=2 * i + 1) for i in (1, 2)}
    lokr = {"lokr_w1": random(4, 2, seed=6), "lokr_w2_a": random(rows // 4, 2, seed=7)}
    lokr["lokr_w2_b"] = random(2, columns // 2, seed=8)
    return {
        "lora": Layer({UP: up, DOWN: down}, 1.0),
        "dora": Layer({UP: up, DOWN: down, DORA: random(rows, 1, seed=9).abs() + 1}, 4.0),
        "loha": Layer(loha, 1.5),
        "lokr": Layer(lokr, 1.0),
    }


def write(path: Path, **layers: Layer) -> Path:
    write_lora_file(LoraFile({name.replace("__", "/"): layer for name, layer in layers.items()}), path, "kohya")
    return path


def run(method: Callable, inputs: dict, out: Path, numbers: dict | None = None, **options) -> Path:
    named = {key: [*map(str, x)] if isinstance(x, list) else str(x) for key, x in inputs.items()}
    run.lines = list(merge({"merged": Step(method, named, numbers or {})}, str(out), **options))  # type: ignore[attr-defined]
    return out


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "locon"])
def test_baking_is_what_peft_does(kind: str, tmp_path: Path) -> None:
    model = pretrained("nano")
    name = "mid_block.resnets.0.conv1" if kind == "locon" else LAYER
    weight = model.unet.get_submodule(name).weight
    if kind == "locon":
        rows, columns = weight.shape[:2]
        layer = Layer({UP: random(rows, 2, 1, 1), DOWN: random(2, columns, 3, 3, seed=1)}, 1.0)
    else:
        layer = layers_for(*weight.shape)[kind]
    file = write(tmp_path / "lora.safetensors", **{f"unet/{name}": layer})
    baked = read(run(methods.add, {"base": "nano", "delta": file}, tmp_path / "out", dtype="fp32"))
    with applied_lora(model, read_lora(file, "lora"), "lora"):
        adapted = model.unet.get_submodule(name)
        adapted.merge()
        expected = adapted.get_base_layer().weight.detach().clone()
        adapted.unmerge()
    assert not torch.allclose(expected, weight, atol=1e-3)
    assert torch.allclose(baked[f"unet/{name}.weight"], expected, atol=1e-5)


def test_baking_adds_up_down_alpha_over_rank(model: Model, tmp_path: Path) -> None:
    up, down = random(12, 2), random(2, 8, seed=1)
    file = write(tmp_path / "lora.safetensors", **{f"unet/{LAYER}": Layer({UP: up, DOWN: down}, 3.0)})
    out = run(methods.add, {"base": model("base"), "delta": file}, tmp_path / "out", {"scale": 0.5})
    found, base = read(out), tensors_of(0)
    weight = f"unet/{LAYER}.weight"
    assert torch.allclose(found[weight] - base[weight], up @ down * (3 / 2) * 0.5, atol=1e-6)
    assert all(torch.equal(found[name], base[name]) for name in SHAPES if name != weight)


def test_a_core_of_a_convolution_is_multiplied_in() -> None:
    up, mid, down = random(6, 2, 1, 1), random(2, 2, 3, 3, seed=1), random(2, 4, 1, 1, seed=2)
    expected = torch.zeros(6, 4, 3, 3)
    for o in range(6):
        for i in range(4):
            expected[o, i] = sum(up[o, r, 0, 0] * mid[r, s] * down[s, i, 0, 0] for r in range(2) for s in range(2))
    assert torch.allclose(lora_delta(Layer({UP: up, MID: mid, DOWN: down}, 2.0)), expected.flatten(1), atol=1e-7)


def test_a_sum_of_loras_is_the_sum_of_what_they_do(tmp_path: Path) -> None:
    files, expected = [], torch.zeros(12, 8)
    for i, scale in enumerate((1.0, -0.5)):
        layer = Layer({UP: random(12, 2, seed=i), DOWN: random(2, 8, seed=10 + i)}, 1.0 + i)
        files.append(write(tmp_path / f"{i}.safetensors", **{f"unet/{LAYER}": layer}))
        expected += scale * lora_delta(layer)
    for to in ("kohya", "diffusers"):
        out = run(
            methods.sum_of, {"deltas": files}, tmp_path / f"{to}.safetensors", {"scales": [1.0, -0.5]},
            rank=4, to=to, dtype="fp32",
        )  # fmt: skip
        (layer,) = read_lora(out, "out").layers.values()
        assert layer.rank == 4
        assert torch.allclose(lora_delta(layer), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_a_resized_lora_is_the_nearest_of_its_rank(kind: str, tmp_path: Path) -> None:
    layer = layers_for(12, 8)[kind]
    file = write(tmp_path / "lora.safetensors", **{f"unet/{LAYER}": layer})
    out = run(methods.sum_of, {"deltas": [file]}, tmp_path / "out.safetensors", rank=1, dtype="fp32")
    found = lora_delta(read_lora(out, "out").layers[f"unet/{LAYER}"])
    singular = torch.linalg.svdvals(lora_delta(layer))
    missed = float(singular[1:].square().sum().sqrt())
    assert float((found - lora_delta(layer)).norm()) == pytest.approx(missed, rel=1e-3)
    with safe_open(out, framework="pt") as opened:
        errors = json.loads(opened.metadata()["sdft.missed"])
    assert errors == {f"unet/{LAYER}": pytest.approx(missed / float(singular.norm()), abs=1e-4)}


def test_extract_then_bake_is_the_tuned_model(model: Model, tmp_path: Path) -> None:
    base, tuned = tensors_of(0), tensors_of(0)
    changed = [f"unet/{LAYER}.weight", "unet/conv_in.weight", "text_encoder_2/text_projection.weight"]
    for name in changed:
        rows, columns = torch.Size(SHAPES[name][:1]).numel(), torch.Size(SHAPES[name][1:]).numel()
        tuned[name] = base[name] + (random(rows, 2) @ random(2, columns, seed=1)).reshape(SHAPES[name])
    tuned["unet/conv_in.bias"] = base["unet/conv_in.bias"] + 1
    a, b = model("tuned", **tuned), model("base", 0)
    lora = run(methods.difference, {"a": a, "b": b}, tmp_path / "l.safetensors", rank=2, dtype="fp32")
    assert {f"{name}.weight" for name in read_lora(lora, "l").layers} == set(changed)
    assert "1 changed weights cannot be stored in a LoRA and are left out, such as unet/conv_in.bias" in run.lines  # type: ignore[attr-defined]
    back = read(run(methods.add, {"base": b, "delta": lora}, tmp_path / "back"))
    assert all(torch.allclose(back[name], tuned[name], atol=1e-5) for name in changed)
    assert torch.equal(back[LONG], base[LONG])


def test_extraction_does_not_depend_on_threads(model: Model, tmp_path: Path) -> None:
    a, b = model("a", 0), model("b", 1)
    hashes = set()
    for threads in (1, 2, 4):
        folder = tmp_path / str(threads)
        folder.mkdir()
        out = run(methods.difference, {"a": a, "b": b}, folder / "l.safetensors", energy=0.8, threads=threads)
        hashes.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(hashes) == 1


def test_the_rank_follows_from_the_energy() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))  # squares 9, 4, 1 of 14
    for energy, rank in ((0.6, 1), (0.65, 2), (0.92, 2), (0.95, 3), (1.0, 3)):
        up, down, missed = best_low_rank(matrix, None, energy, torch.Generator())
        assert len(down) == rank
        expected = [0, 5 / 14, 1 / 14, 0][rank] ** 0.5
        assert missed == pytest.approx(expected, abs=1e-3)
        assert float((up @ down - matrix).norm() / matrix.norm()) == pytest.approx(expected, abs=1e-3)
    assert len(best_low_rank(matrix, 1, 0.95, torch.Generator())[1]) == 1


@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_the_random_range_is_within_a_percent_of_the_optimum(shape: tuple[int, int]) -> None:
    matrix = random(*shape)  # a flat spectrum, the worst case
    up, down, missed = best_low_rank(matrix, 8, None, rng.generator(0, "test"))
    assert len(down) == 8
    best = float(torch.linalg.svdvals(matrix)[8:].square().sum().sqrt())
    real = float((matrix - up @ down).norm())
    assert real <= 1.01 * best
    assert missed * float(matrix.norm()) == pytest.approx(real, rel=1e-4)


def test_the_product_is_never_made_and_the_same() -> None:
    pairs = [(random(30, 3), random(3, 20, seed=1)), (random(30, 2, seed=2), random(2, 20, seed=3))]
    matrix = sum(up @ down for up, down in pairs)
    up, down, missed = best_low_rank_of_sum(pairs, 2, None)
    u, s, v = torch.linalg.svd(matrix)
    assert torch.allclose(up @ down, (u[:, :2] * s[:2]) @ v[:2], atol=1e-5)
    assert missed == pytest.approx(float(s[2:].square().sum().sqrt() / s.norm()), rel=1e-3)


def test_equal_models_have_nothing_to_extract(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="zero in every layer"):
        run(methods.difference, {"a": model("a", 0), "b": model("b", 0)}, tmp_path / "l.safetensors", rank=2)
    assert not (tmp_path / "l.safetensors").exists()
