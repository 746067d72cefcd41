"""A hundred kills from outside, at random times; prints a table.

    PYTHONPATH=tests python tests/training/kill_many.py [HOW_MANY]

Each run is killed again and again until its end, which must have the bits of a run that nobody killed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from small_runs import EVERYTHING, Run, assert_same_end, finish, result, start

from sdft.formats.training_checkpoint import read_state

SETTINGS = {"max_steps": 16, "save_every": 2, "validate_every": 6}


def main(num_kills: int = 100) -> None:
    """Kills every mode in turn, a third of them each."""
    chance, total = random.Random(0), Counter()
    print("| mode | kills | while a file was half written | before the first save | runs, all with identical ends |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        for mode in EVERYTHING:
            seen = kill(Path(root) / mode, mode, -(-num_kills // len(EVERYTHING)), chance)
            print(f"| {mode} | {seen['kills']} | {seen['torn']} | {seen['early']} | {seen['runs']} |", flush=True)
            total.update(seen)
    print(f"| all | {total['kills']} | {total['torn']} | {total['early']} | {total['runs']} |")


def kill(folder: Path, mode: str, num_kills: int, chance: random.Random) -> Counter:
    """What happened in one mode. Raises where a run ends otherwise than the one that nobody killed."""
    options = {"tuning": mode, **SETTINGS, **EVERYTHING[mode]}
    straight = Run(folder / "straight", **options)
    began = time.monotonic()
    expected = result(straight)
    seconds, seen = time.monotonic() - began, Counter()
    while seen["kills"] < num_kills:
        run = Run(folder / f"killed_{seen['runs']}", **options)
        while True:
            run.resume = run.last if run.last.is_file() else None
            started = time.time()
            (process,) = start(run)
            process.join(chance.uniform(0.1, 1.0) * seconds if seen["kills"] < num_kills else None)
            if process.exitcode is not None:
                seconds = min(seconds, time.time() - started)
                break
            os.kill(process.pid, signal.SIGKILL)
            finish([process])
            seen["kills"] += 1
            half_written = run.folder.glob("checkpoints/.*.partial")
            seen["torn"] += any(file.stat().st_mtime > started for file in half_written)
            seen["early"] += not run.last.is_file()
            print(f"{mode}: kill {seen['kills']}, {saved_step(run)} steps saved", file=sys.stderr, flush=True)
        assert process.exitcode == 0, f"{run.folder} did not go on after a kill"
        found = result(Run(run.folder, resume=run.last, **options))  # at its end already: nothing is trained
        assert_same_end(straight, run, {**expected, "validation": None}, {**found, "validation": None})
        shutil.rmtree(run.folder)
        seen["runs"] += 1
    return seen


def saved_step(run: Run) -> int:
    return read_state(run.last)["global_step"] if run.last.is_file() else 0


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
