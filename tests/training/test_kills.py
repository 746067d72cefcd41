"""A run that is killed and started again ends with the same bits as one that was never killed."""

from __future__ import annotations

import os
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checks import assert_equal, slow
from safetensors.torch import load_file
from small_runs import EVERYTHING, KillAt, Run, assert_same_end, finish, result, start, train_py

from sdft.formats.training_checkpoint import read_state
from sdft.training.callbacks.preemption import REQUEUE


def killed_and_resumed(folder: Path, kills: list[KillAt], **options: Any) -> dict[str, Any]:
    """Starts again after each kill, from whatever the last one left."""
    for kill in kills:
        run = Run(folder, **options, callbacks=[kill])
        run.resume = run.last if run.last.is_file() else None
        assert finish(start(run)) == [-9], f"{kill.place} after step {kill.step} was not reached"
    run = Run(folder, **options)
    run.resume = run.last if run.last.is_file() else None
    return result(run)


@pytest.mark.parametrize("tuning", [slow(mode) if mode != "lora_unet" else mode for mode in EVERYTHING])
def test_killed_three_times_at_random_steps_and_moments(tuning: str, tmp_path: Path) -> None:
    """Before the first save, in the middle, and while a checkpoint is half written."""
    options = {"tuning": tuning, "max_steps": 9, "save_every": 2, "validate_every": 4, **EVERYTHING[tuning]}
    straight = Run(tmp_path / "straight", **options)
    expected = result(straight)
    chance = random.Random(tuning)
    steps = [chance.randrange(0, 2), chance.randrange(2, 8)]
    kills = [KillAt(step, chance.choice(KillAt.PLACES[:3])) for step in steps]
    kills.append(KillAt(chance.randrange(2, 8), "on_save_checkpoint"))
    kills.sort(key=lambda kill: kill.step)
    found = killed_and_resumed(tmp_path / "killed", kills, **options)
    assert_same_end(straight, Run(tmp_path / "killed"), expected, found)


def test_a_kill_while_saving_leaves_the_save_before(tmp_path: Path) -> None:
    run = Run(tmp_path, save_every=2, callbacks=[KillAt(4, "on_save_checkpoint")])
    assert finish(start(run)) == [-9]
    assert (tmp_path / "checkpoints" / ".last.ckpt.partial").is_file(), "it was killed in the middle of writing"
    assert read_state(run.last)["global_step"] == 2
    result(Run(tmp_path, save_every=2, resume=run.last))
    assert read_state(run.last)["global_step"] == 6
    assert not (tmp_path / "checkpoints" / ".last.ckpt.partial").exists()


def test_the_last_ones_stay_where_that_is_asked(tmp_path: Path) -> None:
    result(Run(tmp_path, max_steps=8, save_every=2, keep=2))
    kept = {file.name: read_state(file)["global_step"] for file in (tmp_path / "checkpoints").glob("*.ckpt")}
    assert kept == {"last.ckpt": 8, "step_000006.ckpt": 6, "step_000008.ckpt": 8, "best.ckpt": kept["best.ckpt"]}


@pytest.mark.slow
def test_the_same_command_resumes_after_a_warning_and_a_kill(tmp_path: Path) -> None:
    """`train.py` itself, signalled from outside once it has saved; the command has `resume=auto` from the start."""
    words = ["trainer.max_steps=40", "trainer.validate_every=20", "callbacks.last.every=5", "verdict=none"]
    words += ["~callbacks.previews", "logger=csv", "trainer.progress_bar=false", "resume=auto", "data.batch_size=2"]
    words += ["data.train.num_scenes=8", "data.validation.num_scenes=2"]
    command = partial(train_py, words)
    straight, stopped = Run(tmp_path / "straight"), Run(tmp_path / "stopped")
    assert finish(start(straight, function=command)) == [0]
    ends = [(signal.SIGUSR1, REQUEUE, 5), (signal.SIGKILL, -9, 10), (signal.SIGTERM, 143, 15), (signal.SIGINT, 130, 25)]
    for number, status, after in ends:
        (process,) = start(stopped, function=command)
        while process.exitcode is None and not (
            stopped.last.is_file() and read_state(stopped.last)["global_step"] >= after
        ):
            time.sleep(0.05)
        os.kill(process.pid, number)
        assert finish([process]) == [status], "it was to be stopped before its end"
    assert finish(start(stopped, function=command)) == [0]
    a, b = (load_file(run.folder / "lora.safetensors") for run in (straight, stopped))
    assert_equal(a, b, "lora.safetensors")
