"""SDXL at its real size on a CPU: each command that users type, with its peak memory and time.

    python -m benchmarks.full_size [FOLDER]           # needs 50 GB there, and 24 GB of memory
    python -m benchmarks.full_size --divisor 8        # the same commands on a thin SDXL, in minutes

Weights are random and images small, so that the arithmetic of a few steps does not take hours; memory, files, names and
code are those of the real model. Peak memory is the largest resident set of the process, mapped files included.
`--limit` runs the LoRA in a control group that has so much memory, page cache included; it needs root.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from benchmarks.synthetic import Synthetic, write_synthetic

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a photo of a cat"
KILL = -signal.SIGKILL


class Job(NamedTuple):
    """A line of the table.

    words: of the command, after `python`. until: a file at whose appearance the process is killed.
    """

    name: str
    words: Sequence[str]
    until: Path | None = None
    limited: bool = False


class Usage(NamedTuple):
    """What a process took."""

    seconds: float
    peak_gib: float
    status: int


def jobs(root: Path, a: Synthetic, b: Synthetic, size: int) -> list[Job]:
    """All of them, in the order in which they need each other's files."""
    quick = ["logger=csv", "sampler.steps=2", "sampler.batch_size=1", "trainer.accumulate_grad_batches=1"]
    train = ["train.py", *a.overrides, "data=folder", f"data.root={root / 'pictures'}", f"size={size}", *quick]
    train += [f"prompts=[{PROMPT}]", "verdict.num_images=2", "data.bucket_step=null"]
    resumed, lora, blend = root / "resumed", root / "lora", root / "blend.safetensors"
    killed = [*train, "experiment=dreamy_style", f"run_dir={resumed}", "trainer.max_steps=2", "verdict=none"]
    killed += ["callbacks.last.every=1"]
    full = [*train, "experiment=photo_style", "tuning.parts=[text_encoder]", "trainer.max_steps=1"]
    full += ["model.dtype.text_encoder=fp32", "+model.dtype.unet=bf16", "export.dtype=bf16"]
    full += ["export.single_file=true", f"run_dir={root / 'full'}"]
    compared = f"subjects={{base: {a.weights}, lora: {lora}, blend: {blend}}}"
    formats, folder = ["-m", "sdft.formats", f"config={a.config}"], root / "folder"
    return [
        Job("pictures", ["-m", "sdft.data", "toy", f"out={root / 'pictures'}", "count=13", f"size={size}"]),
        Job("dry run", [*train, "experiment=dreamy_style", "dry_run=true"]),
        Job("LoRA", [*train, "experiment=dreamy_style", "trainer.max_steps=2", f"run_dir={lora}"], limited=True),
        Job("new word", [*train, "experiment=word", "trainer.max_steps=2", f"run_dir={root / 'word'}"]),
        Job("full tuning of text encoder 1", full),
        Job("LoRA, killed", killed, until=resumed / "checkpoints" / "last.ckpt"),
        Job("LoRA, resumed", [*killed, "resume=auto"]),
        Job("merge of two", ["-m", "sdft.merging", f"a={a.weights}", f"b={b.weights}", f"out={blend}"]),
        Job(
            "comparison of base, LoRA, merged",
            ["eval.py", *a.overrides, compared, f"prompts=[{PROMPT}]", "seeds=2", f"size={size}", "sampler.steps=2"],
        ),
        Job("single file to folder", [*formats, f"in={a.weights}", f"out={folder}", "to=folder"]),
        Job("folder to single file", [*formats, f"in={folder}", f"out={root / 'again.safetensors'}", "to=single_file"]),
        Job(
            "LoRA to kohya's names",
            [*formats, f"in={lora / 'lora.safetensors'}", f"out={root / 'kohya.safetensors'}", "to=kohya"],
        ),
    ]


def run(job: Job, root: Path, log: Path, limit: float | None) -> Usage:
    """Run a job in the folder `root`; its output goes to `log`."""

    group = control_group(limit) if limit is not None and job.limited else None

    def limited() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    begun, environment = time.monotonic(), os.environ | {"PYTHONPATH": str(ROOT)}
    environment |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    with log.open("wb") as written:
        first, *rest = job.words
        command = [sys.executable, str(ROOT / first) if first.endswith(".py") else first, *rest]
        child = subprocess.Popen(command, cwd=ROOT, stdout=written, stderr=written, env=environment, preexec_fn=limited)
        peak = 0.0
        while child.poll() is None:
            peak = max(peak, resident_gib(child.pid))
            if job.until is not None and job.until.is_file():
                child.kill()
            time.sleep(0.02)
    if group is not None:
        group.rmdir()
    return Usage(time.monotonic() - begun, peak, child.returncode)


def resident_gib(pid: int) -> float:
    """The largest resident set of a process so far."""
    try:
        rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(row.split()[1]) / 2**20 for row in rows if row.startswith("VmHWM")), 0.0)


def control_group(limit: float) -> Path:
    """A new control group, of version 1 or 2, with `limit` GiB of memory."""
    root = Path("/sys/fs/cgroup")
    first = (root / "memory").is_dir()
    group = (root / "memory" if first else root) / f"sdft_full_size_{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(int(limit * 2**30)))
    return group


def table(rows: Sequence[tuple[Job, Usage]]) -> str:
    """The rows, as Markdown."""
    lines = ["| command | peak memory, GiB | seconds |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {job.name} | {used.peak_gib:.2f} | {used.seconds:.0f} |" for job, used in rows)])


def measured(
    root: Path, divisor: int, size: int, limit: float | None, only: Sequence[str], report: Callable[[str], object]
) -> list[tuple[Job, Usage]]:
    """Run the jobs, and stop with the output of the first one that fails."""
    a, b = (write_synthetic(root / name, divisor, seed=seed) for name, seed in (("a", 0), ("b", 1)))
    report(f"two files of {a.weights.stat().st_size / 2**30:.2f} GiB in {root}")
    rows = []
    for job in jobs(root, a, b, size):
        if only and job.name not in only:
            continue
        log = root / f"{job.name}.log"
        used = run(job, root, log, limit)
        report(f"{job.name}: {used.seconds:.0f} s, peak {used.peak_gib:.2f} GiB")
        if used.status not in ((0, KILL) if job.until else (0,)):
            raise SystemExit(f"{job.name} ended with {used.status}; the end of {log}:\n{log.read_text()[-3000:]}")
        rows.append((job, used))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--divisor", type=int, default=1)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--limit", type=float, help="GiB of address space")
    parser.add_argument("--only", nargs="+", default=[])
    args = parser.parse_args()
    with nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        rows = measured(root, args.divisor, args.size, args.limit, args.only, lambda line: print(line, flush=True))
    print(table(rows))


if __name__ == "__main__":
    main()
