"""A checkpoint of SDXL's size: single file to folder and back, and loading, compared with `cp` of the same bytes.

    python -m benchmarks.formats [FOLDER]        # needs 22 GB there

Prints wall time, the time of `cp` in the same run and peak private memory (RssAnon of the process).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.synthetic import write_config, write_weights
from sdft.formats.model_checkpoint import open_checkpoint

LOAD = """
import sys
from sdft.models.load import pretrained
dtype = {part: sys.argv[3] for part in ("unet", "vae", "text_encoder", "text_encoder_2")}
model = pretrained(sys.argv[1], config=sys.argv[2], dtype=dtype)
print(sum(p.nbytes for p in model.parameters()))
"""


def run(*command: object) -> tuple[float, float, str]:
    """(seconds, peak private GiB, output) of a process."""
    begun, peak = time.perf_counter(), 0
    child = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while child.poll() is None:
        peak = max(peak, private_kib(child.pid))
        time.sleep(0.02)
    seconds, (out, err) = time.perf_counter() - begun, child.communicate()
    if child.returncode:
        raise SystemExit(err)
    return seconds, peak / 2**20, out


def private_kib(pid: int) -> int:
    """Anonymous memory of a process; the system can drop pages of mapped files."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(row.split()[1]) for row in status.splitlines() if row.startswith("RssAnon")), 0)


def same_bits(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same weights."""
    first, second = open_checkpoint("a", a), open_checkpoint("b", b)
    with first.opened() as x, second.opened() as y:
        return first.weights.keys() == second.weights.keys() and all(
            torch.equal(x(name), y(name)) for name in first.weights
        )


def main() -> None:
    """The three lines."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        root = Path(folder)
        single, back = root / "sdxl.safetensors", root / "back.safetensors"
        model, config = root / "model", root / "config"
        write_config(config)
        write_weights(single, config, torch.float16, seed=0)
        gib = single.stat().st_size / 2**30
        print(f"an SDXL checkpoint of random numbers: {gib:.2f} GiB", flush=True)
        convert = [sys.executable, "-m", "sdft.formats", f"config={config}"]
        jobs = [
            ("file to folder", [*convert, f"in={single}", f"out={model}", "to=folder"]),
            ("folder to file", [*convert, f"in={model}", f"out={back}", "to=single_file"]),
        ]
        for name, command in jobs:
            copied, _, _ = run("cp", single, root / "copy")
            synced, _, _ = run("sync", root / "copy")
            (root / "copy").unlink()
            seconds, peak, _ = run(*command)
            print(
                f"{name}: {seconds:.1f} s = {seconds / copied:.2f} x cp ({copied:.1f} s) = "
                f"{seconds / (copied + synced):.2f} x cp and sync ({copied + synced:.1f} s); "
                f"peak private {peak:.2f} GiB (goals: 3 x cp, 1 GiB)",
                flush=True,
            )
        print(f"round trip: {'bit-identical' if same_bits(single, back) else 'NOT THE SAME BITS'}", flush=True)
        for dtype in ("fp16", "bf16", "fp32"):
            seconds, peak, out = run(sys.executable, "-c", LOAD, single, config, dtype)
            held = int(out.split()[-1]) / 2**30
            print(
                f"load as {dtype}: {seconds:.1f} s, peak private {peak:.2f} GiB = {peak / held:.2f} x the weights held "
                f"({held:.2f} GiB; goal: 1.2)",
                flush=True,
            )


if __name__ == "__main__":
    main()
