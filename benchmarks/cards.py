"""The presets of `hardware=`, each as a run of its own: forecast and measured memory, and images per second.

    python -m benchmarks.cards                           # SDXL at 1024 px with random weights; needs a GPU and 20 GB
    python -m benchmarks.cards --divisor 8 --size 128    # the same commands on a thin SDXL, on any device

A card is not simulated: a run on a large GPU shows how much its preset takes, which `dry_run` should have forecast to a
tenth. Peak memory of the GPU is what torch has reserved, without CUDA's own, for which forecasts add 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.full_size import resident_gib
from benchmarks.synthetic import Synthetic, write_synthetic

ROOT = Path(__file__).resolve().parents[1]
RUNS = {
    "6gb": "style",
    "8gb": "style",
    "8gb, a new word": "word",
    "12gb": "style",
    "12gb_full": "tuning=full",
    "24gb": "style",
    "24gb_full": "tuning=full",
    "48gb": "style",
    "80gb": "style",
}
"""Line of the table, which begins with the preset -> experiment."""
WATCHED = """
import json, runpy, sys, torch
try:
    runpy.run_path("train.py", run_name="__main__")
finally:
    on_gpu = torch.cuda.is_available()
    found = {"gpu_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None}
    print("MEASURED" + json.dumps(found))
"""
HEADER = "| preset | forecast, GiB | GPU, GiB | machine, GiB | images/s |\n|---|---|---|---|---|"


def words(line: str, model: Synthetic, folder: Path, size: int, num_steps: int) -> list[str]:
    """Overrides of the run of a line."""
    chosen = RUNS[line]
    experiment = chosen if "=" in chosen else f"experiment={chosen}"
    short = [f"trainer.max_steps={num_steps}", f"trainer.validate_every={num_steps}", "epochs=null"]
    short += ["callbacks.previews.every=100000"]
    data = ["data=folder", f"data.root={folder / 'pictures'}", f"data.cache_dir={folder / 'cache'}"]
    drawn = ["sampler.steps=2", "verdict=none", "logger=csv", "trainer.progress_bar=false"]
    return [experiment, f"hardware={line.partition(',')[0]}", *model.overrides, f"size={size}", *data, *short, *drawn]


def forecast(overrides: Sequence[str]) -> str:
    """GiB that `dry_run` forecasts for the device, with 1 for libraries."""
    command = [sys.executable, "train.py", *overrides, "dry_run=true", "preflight.memory=200", "preflight.tflops=100"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    found = re.search(r"memory of each device: ([\d.]+) GiB", printed)
    return found[1] if found else "none"


def row(line: str, model: Synthetic, folder: Path, size: int, num_steps: int) -> str:
    """The row of a line, from a forecast and a run."""
    overrides = words(line, model, folder, size, num_steps)
    run_dir, log = folder / "runs" / line.replace(", ", "_").replace(" ", "_"), folder / "log.txt"
    command = [sys.executable, "-c", WATCHED, *overrides, f"run_dir={run_dir}"]
    with log.open("w") as written:
        child = subprocess.Popen(command, cwd=ROOT, stdout=written, stderr=subprocess.STDOUT, env=environment())
        peak = 0.0
        while child.poll() is None:
            peak = max(peak, resident_gib(child.pid))
    printed = log.read_text(errors="replace")
    if child.returncode:
        return f"| {line} | {forecast(overrides)} | failed: {printed.strip().splitlines()[-1][:120]} | | |"
    measured = json.loads(re.findall(r"MEASURED(.*)", printed)[-1])
    summary = json.loads((run_dir / "summary.json").read_text())
    per_step = int(re.findall(r"effective batch (\d+)", printed)[-1])
    rate = summary["num_steps"] * per_step / summary["train_seconds"]
    gpu = "none" if measured["gpu_gib"] is None else f"{measured['gpu_gib']:.2f}"
    return f"| {line} | {forecast(overrides)} | {gpu} | {peak:.2f} | {rate:.2f}, with caching |"


def environment() -> dict[str, str]:
    """Of the commands: no network, and this checkout."""
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}


def measured(folder: Path, divisor: int, size: int, num_steps: int, only: Sequence[str], report: Callable) -> None:
    """Report the rows of the table, one by one."""
    model = write_synthetic(folder / "model", divisor)
    pictures = ["-m", "sdft.data", "toy", f"out={folder / 'pictures'}", "count=16", f"size={size}"]
    subprocess.run([sys.executable, *pictures], cwd=ROOT, check=True, env=environment(), capture_output=True)
    report(HEADER)
    for line in only or RUNS:
        report(row(line, model, folder, size, num_steps))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="a new folder; a temporary one by default")
    parser.add_argument("--divisor", type=int, default=1, help="of all widths: 8 is a thin SDXL")
    parser.add_argument("--size", type=int, default=1024, help="side of the images")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a run")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=[], help="lines of the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        measured(folder, args.divisor, args.size, args.steps, args.only, lambda text: print(text, flush=True))


if __name__ == "__main__":
    main()
