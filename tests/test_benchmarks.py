"""The benchmarks run on nano on a CPU; their results are not tested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_nano() -> None:
    words = ["--model=nano", "--steps=1", "--modes", "lora_unet", "--batch-sizes", "1"]
    command = [sys.executable, "-m", "benchmarks.gpu", *words, "--variants", "sdft", "xformers"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    rows = [row.split("|")[1:-1] for row in done.stdout.splitlines() if row.startswith("| lora")]
    plain, ours, refused = ([cell.strip() for cell in row] for row in rows)
    assert plain[2] == "plain loop"
    assert float(plain[3]) > 0
    assert float(ours[3]) > 0
    assert float(ours[4]) > 0
    assert float(ours[8]) > 0, "the forecast"
    assert refused[2] == "xformers"
    assert "model.attention=xformers" in refused[3]
