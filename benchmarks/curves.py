"""Validation losses of the thrifty ways to train beside fp32: what each costs in quality on nano.

    python -m benchmarks.curves [full] [lora] [--steps 200]

Each run has the same images, noise and order. The last column is its final validation loss relative to that of the
first line.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = {
    "full": {
        "fp32": [],
        "bf16, stochastic rounding": ["++model.dtype.unet=bf16"],
        "bf16, fused backward": ["++model.dtype.unet=bf16", "fused_backward=true"],
    },
    "lora": {
        "fp32 base": [],
        "int8 base": ["model.quantization={unet: int8}"],
    },
}
TUNING = {"full": ["tuning=full", "base_lr=5e-5"], "lora": []}
SHORT = ["verdict=none", "reference=none", "logger=csv", "trainer.progress_bar=false", "data.batch_size=4"]


def losses(folder: Path, words: list[str], num_steps: int) -> dict[int, float]:
    """Step -> validation loss of a run."""
    limits = [f"trainer.max_steps={num_steps}", f"trainer.validate_every={num_steps // 4}", f"run_dir={folder}"]
    command = [sys.executable, "train.py", "experiment=dreamy_style", *SHORT, *limits, *words]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]) + 1: float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(RUNS), help="full, lora")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments.kinds:
            reference = None
            for number, (name, words) in enumerate(RUNS[kind].items()):
                found = losses(Path(folder) / f"{kind}{number}", [*TUNING[kind], *words], arguments.steps)
                final = found[max(found)]
                reference = reference or final
                curve = "  ".join(f"{step}: {loss:.5f}" for step, loss in sorted(found.items()))
                print(f"{kind}, {name:26} {curve}   {final / reference:.4f}", flush=True)


if __name__ == "__main__":
    main()
