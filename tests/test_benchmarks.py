"""The benchmarks run on nano on a CPU; their results are not tested."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from sdft.api import compose
from sdft.batch import Conditioning
from sdft.config.command import build
from sdft.errors import UserError
from sdft.models import load

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_gpu_benchmark_measures_a_preset_on_nano() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--model=nano", "--steps=1", "--modes", "--presets", "6gb"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    (row,) = [row for row in done.stdout.splitlines() if row.startswith("| lora")]
    _, batch, name, images_per_s, _, _, _, forecast, *_ = [cell.strip() for cell in row.split("|")[1:-1]]
    assert (batch, name) == ("1 x 4", "hardware=6gb")
    assert float(images_per_s) > 0
    assert float(forecast) > 0


def test_its_plain_loop_is_measured_and_errors_are_rows() -> None:
    args = Namespace(model="nano", size=64, batch_size=2, steps=1, mode="lora_unet", hardware=None, profile=None)
    values = gpu.one(Namespace(**vars(args), variant=gpu.PLAIN))
    plan = Future()
    plan.set_result({"steps": 0.5, "start": 1.5})
    case = {"mode": "lora_unet", "batch_size": 2}
    cells = gpu.row("sdft", case, values, {("lora_unet", 2): values["images_per_s"] / 2}, plan).split(" | ")
    assert cells[:5] == ["| lora_unet", "2", "sdft", f"{values['images_per_s']:.2f}", "2.00"]
    assert (cells[7], cells[9]) == ("0.50", "1.50")
    with pytest.raises(UserError, match=r"model.attention=xformers"):
        gpu.one(Namespace(**vars(args), variant="xformers"))
    assert gpu.row("xformers", case, "no xformers", {}, plan).startswith("| lora_unet | 2 | xformers | no xformers |")


@pytest.mark.parametrize("preset", [[], ["hardware=6gb"], ["hardware=8gb"]])
def test_its_random_sdxl_is_what_the_loader_makes(preset, thin_sdxl, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same layers, dtypes, formats and switches, on SDXL's topology, and values of the same scale."""
    monkeypatch.setattr(load, "SDXL_BASE", thin_sdxl.config)
    cfg = compose("train", ["model=sdxl", *preset])
    made = gpu.build_model(cfg, torch.device("cpu"))
    cfg.model.weights, cfg.model.config = str(thin_sdxl.weights), str(thin_sdxl.config)
    loaded = build(cfg.model)
    kinds = [[(n, p.dtype, p.shape, p.requires_grad) for n, p in m.named_parameters()] for m in (made, loaded)]
    assert kinds[0] == kinds[1]
    assert (made.offload_idle, made.decoded_tile) == (loaded.offload_idle, loaded.decoded_tile)
    assert made.unet.is_gradient_checkpointing == loaded.unet.is_gradient_checkpointing
    context, pooled = made.encode_prompts(["a cat"])
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    with torch.no_grad():
        eps = made.denoise(torch.randn(1, 4, 8, 8), torch.tensor([500]), Conditioning(context, pooled, sizes))
    assert 0.01 < eps.float().std() < 100
