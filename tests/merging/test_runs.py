"""Outputs of runs are merged, and merges are trained further: run folders, the way between two, extracted LoRAs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import LAYER, LONG, read, tensors_of

from sdft.batch import Conditioning
from sdft.errors import UserError
from sdft.formats.diffusers_folder import write_folder
from sdft.formats.lora_file import write_lora_file
from sdft.formats.lora_layer import DOWN, UP, Layer, LoraFile
from sdft.merging import methods
from sdft.merging.interpolation import interpolate
from sdft.merging.merge import merge
from sdft.merging.recipe import Step
from sdft.models.load import NANO, pretrained
from sdft.models.sdxl import SDXL
from sdft.sampling.generate import generate
from sdft.sampling.samplers import Sampler

WEIGHT = f"unet/{LAYER}.weight"


@pytest.fixture
def runs(tmp_path: Path, model: Callable[..., Path]) -> dict[str, Path]:
    """The base, and what a run left that tuned it whole and one that trained a LoRA on it; both were moved since."""
    found = {name: tmp_path / name for name in ("full", "lora", "words")}
    for run in found.values():
        run.mkdir()
    model("full/model", 1)
    up, down = (torch.randn(shape, generator=torch.Generator().manual_seed(5)) for shape in ((12, 2), (2, 8)))
    for name in ("lora", "words"):
        layers = {f"unet/{LAYER}": Layer({UP: up, DOWN: down}, 2.0)}
        write_lora_file(LoraFile(layers), found[name] / "lora.safetensors", "diffusers", torch.float32)
    left = {"full": {"model": "old/model"}, "lora": {"lora": "old/lora.safetensors"}}
    left["words"] = {**left["lora"], "words": "old/words.safetensors"}
    for name, artifacts in left.items():
        (found[name] / "summary.json").write_text(json.dumps({"artifacts": artifacts}))
    return found | {"base": model("base", 0)}


def test_the_way_from_a_lora_to_a_whole_model(runs: dict[str, Path], tmp_path: Path) -> None:
    ends, base = (str(runs["lora"]), str(runs["full"])), str(runs["base"])
    points = list(interpolate(*ends, str(tmp_path / "out"), [0.25, 1.0], base))
    assert [name for name, _ in points] == ["lora", "0.25", "1", "full"]
    assert points[-1][1] == str(runs["full"] / "model")
    a, blend, last, b = (read(Path(path)) for _, path in points)
    change = a[WEIGHT] - tensors_of(0)[WEIGHT]
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2
    assert torch.allclose(blend[WEIGHT], 0.75 * a[WEIGHT] + 0.25 * b[WEIGHT], atol=1e-6)
    assert torch.allclose(blend[LONG], 0.75 * tensors_of(0)[LONG] + 0.25 * tensors_of(1)[LONG], atol=1e-6)
    assert all(torch.equal(last[name], b[name]) for name in b)


def test_new_words_and_unfinished_runs_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    def bake(run: Path) -> None:
        list(merge({"out": Step(methods.add, {"base": str(runs["base"]), "delta": str(run)})}, str(tmp_path / "out")))

    with pytest.raises(UserError, match=r"delta=.*words: the run also trained new words.*pass .*lora.safetensors"):
        bake(runs["words"])
    (runs["lora"] / "lora.safetensors").unlink()
    with pytest.raises(UserError, match="the run has neither a LoRA nor a model"):
        bake(runs["lora"])


def test_an_extracted_lora_draws_the_tuned_models_pictures(tmp_path: Path) -> None:
    """nano tuned in two layers; the change as a LoRA, put back: the same pictures to a grey level."""
    files = {name: str(tmp_path / name) for name in ("tuned", "lora.safetensors", "back", "change.safetensors")}
    layers = {}
    for i in (1, 2):
        name = f"up_blocks.1.attentions.2.transformer_blocks.0.attn{i}.to_v"
        rows, columns = read(NANO)[f"unet/{name}.weight"].shape
        noise = torch.Generator().manual_seed(i)
        held = {UP: torch.randn(rows, 3, generator=noise), DOWN: 0.1 * torch.randn(3, columns, generator=noise)}
        layers[f"unet/{name}"] = Layer(held, 3.0)
    write_lora_file(LoraFile(layers), Path(files["change.safetensors"]), "kohya", torch.float32)
    for out, step, options in (
        ("tuned", Step(methods.add, {"base": "nano", "delta": files["change.safetensors"]}), {"dtype": "fp32"}),
        ("lora.safetensors", Step(methods.difference, {"a": files["tuned"], "b": "nano"}), {"rank": 3}),
        ("back", Step(methods.add, {"base": "nano", "delta": files["lora.safetensors"]}), {"dtype": "fp32"}),
    ):
        list(merge({"step": step}, files[out], **options))  # type: ignore[arg-type]
    base, tuned, back = (
        drawn(pretrained(path), ["a photo of a cat"]) for path in ("nano", files["tuned"], files["back"])
    )
    assert np.abs(tuned - base).max() > 5
    assert np.abs(back - tuned).max() <= 1


@pytest.mark.slow
def test_a_full_fine_tune_as_a_lora_draws_nearly_its_pictures(tmp_path: Path) -> None:
    """nano's UNet is trained on grey images: of full rank everywhere, and in biases and norms, which a LoRA lacks."""
    prompts = ["a photo of a cat", "a castle at night"]
    model = pretrained("nano")
    base = drawn(model, prompts)
    with torch.no_grad():
        cond = Conditioning(*model.encode_prompts(prompts), torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2))
        z0 = model.encode_moments(torch.zeros(2, 3, 128, 128)).chunk(2, 1)[0] * model.vae.config.scaling_factor
    keep = torch.as_tensor(model.scheduler.alphas_cumprod)
    noise, optimizer = torch.Generator().manual_seed(0), torch.optim.Adam(model.unet.parameters(), 2e-4)
    for _ in range(5):
        t, eps = torch.randint(200, 1000, (2,), generator=noise), torch.randn(z0.shape, generator=noise)
        share = keep[t].reshape(2, 1, 1, 1)
        loss = (model.denoise(share.sqrt() * z0 + (1 - share).sqrt() * eps, t, cond) - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tuned = drawn(model, prompts)
    write_folder(model, tmp_path / "tuned")
    change = Step(methods.difference, {"a": str(tmp_path / "tuned"), "b": "nano"})
    list(merge({"change": change}, str(tmp_path / "lora.safetensors"), rank=64, energy=0.99))
    baked = Step(methods.add, {"base": "nano", "delta": str(tmp_path / "lora.safetensors")})
    list(merge({"baked": baked}, str(tmp_path / "back"), dtype="fp32"))
    error = np.abs(drawn(pretrained(str(tmp_path / "back")), prompts) - tuned).mean()
    moved = np.abs(tuned - base).mean()
    assert moved > 5
    assert error < 0.1 * moved


def drawn(model: SDXL, prompts: Sequence[str]) -> np.ndarray:
    return generate(model, prompts, range(len(prompts)), Sampler(steps=4), (128, 128)).astype(int)
