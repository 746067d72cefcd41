"""The benchmarks run on nano on a CPU; their results are not tested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import build_model
from sdft.api import compose
from sdft.batch import Conditioning
from sdft.config.command import build
from sdft.models import load

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_nano() -> None:
    words = ["--model=nano", "--steps=1", "--modes", "lora_unet", "--batch-sizes", "1", "--presets", "6gb"]
    command = [sys.executable, "-m", "benchmarks.gpu", *words, "--variants", "xformers"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    rows = [row.split("|")[1:-1] for row in done.stdout.splitlines() if row.startswith("| lora")]
    plain, refused, ours = ([cell.strip() for cell in row] for row in rows)
    assert plain[2] == "plain loop"
    assert float(plain[3]) > 0
    assert float(ours[3]) > 0
    assert float(ours[4]) > 0
    assert float(ours[7]) > 0, "the forecast"
    assert refused[2] == "xformers"
    assert "model.attention=xformers" in refused[3]
    assert ours[1:3] == ["1 x 4", "hardware=6gb"]


@pytest.mark.parametrize("preset", [[], ["hardware=6gb"], ["hardware=8gb"]])
def test_its_random_sdxl_is_what_the_loader_makes(preset, thin_sdxl, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same layers, dtypes, formats and switches, on SDXL's topology, and values of the same scale."""
    monkeypatch.setattr(load, "SDXL_BASE", thin_sdxl.config)
    cfg = compose("train", ["model=sdxl", *preset])
    made = build_model(cfg, torch.device("cpu"))
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
