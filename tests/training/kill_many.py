"""A hundred kills from outside, at random times, a quarter of them by SIGTERM; prints a table.

    PYTHONPATH=tests python tests/training/kill_many.py [HOW_MANY]

Each run, comparison, merge and cache is killed again and again until its end, which must have the bits of one that
nobody killed.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from small_runs import EVERYTHING, Run, assert_same_end, command_py, finish, result, start

from sdft.formats.training_checkpoint import read_state
from sdft.training.callbacks.preemption import Preempt

SETTINGS = {"max_steps": 16, "save_every": 2, "validate_every": 6}
IMAGES = ["subjects={base: nano, half: nano}", "prompts=[a cat,a dog,a castle,a car]", "seeds=4", "sampler.steps=4"]
ENTRIES = "*.safetensors"
COMMANDS: dict[str, tuple[str, list[str], str]] = {
    "eval": ("sdft.evaluation", [*IMAGES, "sampler.batch_size=1", "size=32", "run_dir=OUT"], "pictures/*.png"),
    "merge": (
        "sdft.merging",
        ["a=nano", "b=nano", "alpha=0.3", "out=OUT/merged", "overwrite=true", "config=nano"],
        "**/*",
    ),
    "cache": ("sdft.data", ["cache", "data=toy", "style=dreamy", "out=OUT", "size=64"], ENTRIES),
}
"""Command -> its module, its words (OUT is its folder), and the files that must have the same bytes in the end."""


class Listening(Preempt):
    """Installs its handlers in the process that trains."""

    def __init__(self, run_dir: str):
        self.folder = run_dir

    def setup(self, *_: Any, **__: Any) -> None:
        super().__init__(self.folder)


def main(num_kills: int = 100) -> None:
    """Kills every mode of training and every command in turn, an equal share of them each."""
    chance, total = random.Random(0), Counter()
    share = -(-num_kills // (len(EVERYTHING) + len(COMMANDS)))
    columns = ("kills", "by SIGTERM", "while a file was half written", "before the first save")
    print(f"| what | {' | '.join(columns)} | runs, all with identical ends |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as root:
        for mode in EVERYTHING:
            total += shown(f"training, {mode}", kill(Path(root) / mode, mode, share, chance))
        for name in COMMANDS:
            total += shown(name, kill_command(Path(root) / name, name, share, chance))
    shown("all", total)


def shown(what: str, seen: Counter) -> Counter:
    """Prints a row of the table."""
    cells = (seen[name] for name in ("kills", "terminated", "torn", "early", "runs"))
    print(f"| {what} | {' | '.join(map(str, cells))} |", flush=True)
    return seen


def signalled(process: Any, seen: Counter) -> bool:
    """Whether a signal ended the process; it may have ended just before.

    Every fourth one is a SIGTERM, which a process may answer in its own way; the others are SIGKILL.
    """
    number = signal.SIGKILL if (seen["kills"] + 1) % 4 else signal.SIGTERM
    os.kill(process.pid, number)
    (status,) = finish([process])
    if status == 0:
        return False
    assert status in ((-9,) if number == signal.SIGKILL else (-15, 143)), status
    seen["kills"] += 1
    seen["terminated"] += number == signal.SIGTERM
    return True


def kill(folder: Path, mode: str, num_kills: int, chance: random.Random) -> Counter:
    """What happened in one mode. Raises where a run ends otherwise than the one that nobody killed."""
    options = {"tuning": mode, **SETTINGS, **EVERYTHING[mode]}
    straight = Run(folder / "straight", **options)
    began = time.monotonic()
    expected = result(straight)
    seconds, seen = time.monotonic() - began, Counter()
    while seen["kills"] < num_kills:
        place = folder / f"killed_{seen['runs']}"
        run = Run(place, **options, callbacks=[Listening(str(place))])
        while True:
            run.resume = run.last if run.last.is_file() else None
            started = time.time()
            (process,) = start(run)
            process.join(chance.uniform(0.1, 1.0) * seconds if seen["kills"] < num_kills else None)
            if process.exitcode is not None or not signalled(process, seen):
                seconds = min(seconds, time.time() - started)
                break
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


def kill_command(folder: Path, name: str, num_kills: int, chance: random.Random) -> Counter:
    """What happened to one command. Raises where it leaves other files than the one that nobody killed."""
    module, words, pattern = COMMANDS[name]

    def started(place: Path) -> Any:
        given = [word.replace("OUT", str(place)) for word in words]
        return start(Run(place), function=partial(command_py, module, given))[0]

    began = time.monotonic()
    assert finish([started(folder / "straight")]) == [0]
    expected, seen, seconds = digests(folder / "straight", pattern), Counter(), time.monotonic() - began
    assert expected, "it wrote nothing"
    while seen["kills"] < num_kills:
        place = folder / f"killed_{seen['runs']}"
        while True:
            process = started(place)
            process.join(chance.uniform(0.1, 1.0) * seconds if seen["kills"] < num_kills else None)
            if process.exitcode is not None or not signalled(process, seen):
                break
            seen["torn"] += any(place.rglob(".*partial*")) or any(place.rglob(".writing-*"))
            seen["early"] += not digests(place, pattern)
            print(f"{name}: kill {seen['kills']}", file=sys.stderr, flush=True)
        assert process.exitcode == 0, f"{place} did not go on after a kill"
        assert digests(place, pattern) == expected, place
        shutil.rmtree(place)
        seen["runs"] += 1
    return seen


def digests(folder: Path, pattern: str) -> dict[str, str]:
    """The files that belong to the result, and the hash of each; of a cache, its entries, in whatever files."""
    if pattern == ENTRIES:
        entries: dict[str, str] = {}
        for file in folder.glob(pattern):
            for address, tensor in load_file(file).items():
                entries[address] = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).hexdigest()
        return entries
    files = [file for file in folder.glob(pattern) if file.is_file() and file.name != "result_0.pt"]
    kept = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in kept}


def saved_step(run: Run) -> int:
    return read_state(run.last)["global_step"] if run.last.is_file() else 0


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
