"""A save in slices, written while training goes on: whole or not there at all, and the same as a save in one file."""

from __future__ import annotations

import copy
import os
import re
import resource
import signal
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from small_runs import WRONG, FullFrom, KillAt, Run, assert_same_end, finish, result, start

from sdft.errors import UserError
from sdft.formats.training_checkpoint import (
    SLICE_FILES,
    VERSION,
    link_state,
    read_state,
    remove_state,
    slices_folder,
    write_slices,
    write_state,
)
from sdft.training.callbacks.preemption import REQUEUE, Preempt

WEIGHTS = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(1, 2)}
NAMES = ["one", "two"]


def write_in_slices(path: Path, step: int, names: list[str]) -> None:
    """As two processes would: the last slice of `b` is empty."""
    for name, rows in zip(names, (slice(0, 2), slice(2, 4)), strict=True):
        write_slices([WEIGHTS["a"][rows], WEIGHTS["b"][rows.start // 2 :][:1]], path, name)
    outlines = {name: weight.to("meta") for name, weight in WEIGHTS.items()}
    write_state({"weights": outlines | {"num": 5}, "step": step, SLICE_FILES: names}, path)


def test_slices_are_put_together_when_they_are_asked_for(tmp_path: Path) -> None:
    write_in_slices(tmp_path / "last.ckpt", 7, NAMES)
    state = read_state(tmp_path / "last.ckpt")
    assert state.keys() == {"weights", "step"}
    assert state["step"] == 7
    weights = state["weights"]
    assert weights["a"] is not weights["a"], "it is not kept"
    for found in (weights, dict(weights), {**weights}, OrderedDict(weights), dict(weights.items())):
        assert found["num"] == found.get("num") == 5
        assert all(torch.equal(found[name], weight) for name, weight in WEIGHTS.items())
    assert copy.deepcopy(state)["weights"] is weights, "a copy reads nothing"
    assert torch.equal(weights.pop("a"), WEIGHTS["a"])


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "missing"])
def test_a_damaged_slice_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_in_slices(path, 7, NAMES)
    whole = {"state_dict": {}, "global_step": 6, "callbacks": {}, "loops": {}, VERSION: "2.6"}
    write_state(whole, tmp_path / "step_000006.ckpt")
    file = slices_folder(path) / "two"
    content = bytearray(file.read_bytes())
    content[content.index(WEIGHTS["a"][2:].numpy().tobytes())] ^= 1
    damaged = {"cut": content[: len(content) // 2], "empty": b"", "flipped": content}
    file.unlink() if damage == "missing" else file.write_bytes(damaged[damage])
    message = "missing" if damage == "missing" else r"damaged \(.+\)"
    with pytest.raises(UserError, match=rf"resume: {re.escape(str(file))} is {message}; .*resume=\S+step_000006\.ckpt"):
        read_state(path)


def test_slices_go_with_their_state(tmp_path: Path) -> None:
    path, second = tmp_path / "last.ckpt", tmp_path / "step_000001.ckpt"
    write_in_slices(path, 1, NAMES)
    (slices_folder(path) / ".two.partial").touch()
    link_state(path, second)
    write_in_slices(path, 2, ["three", "four"])
    assert {file.name for file in slices_folder(path).iterdir()} == {"three", "four"}
    assert [read_state(file)["step"] for file in (path, second)] == [2, 1]
    assert torch.equal(read_state(second)["weights"]["a"], WEIGHTS["a"])
    remove_state(second)
    write_state({"step": 3}, path)  # as when one process resumes
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


class KillInSlice(L.Callback):
    """From a step on, the system kills one rank in the middle of a file; nothing of it runs on."""

    def __init__(self, step: int, rank: int):
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def end_of(run: Run, rank: int) -> int:
    """How a rank ends; the other is killed then, as a cluster does with the rest of a job."""
    ranks = start(run, 2)
    ranks[rank].join(60)
    ranks[1 - rank].kill()
    return finish(ranks)[rank]


@pytest.mark.slow
def test_killed_in_a_slice_and_between_slices_and_commit(tmp_path: Path) -> None:
    """Each time the save of before is whole, and the end has the bits of a run that was never killed."""
    options: dict[str, Any] = {"strategy": "fsdp", "save_every": 2}
    straight, run = Run(tmp_path / "straight", **options), Run(tmp_path / "killed", **options)
    expected = result(straight, 2)
    run.callbacks = [KillInSlice(3, rank=1)]
    assert end_of(run, 1) == -signal.SIGXFSZ
    assert list(slices_folder(run.last).glob(".step_000004.*.rank_1_of_2.partial")), "it was killed in the middle"
    assert read_state(run.last)["global_step"] == 2
    run.resume, run.callbacks = run.last, [KillAt(4, "on_save_checkpoint")]
    assert end_of(run, 0) == -signal.SIGKILL
    assert len(list(slices_folder(run.last).glob("step_000004.*"))) >= 2, "all slices were there"
    assert (run.last.parent / ".last.ckpt.partial").is_file(), "it was killed in the middle of the commit"
    assert read_state(run.last)["global_step"] == 2
    run.callbacks = []
    found = result(run, 2)
    assert_same_end(straight, run, expected, found)
    assert {file.name[:11] for file in slices_folder(run.last).iterdir()} == {"step_000006"}


class Slow(L.Callback):
    """The disk is slow until another step is done."""

    def __init__(self, last: Path):
        self.last = last

    def on_train_start(self, *_: Any) -> None:
        self.later, fsync = threading.Event(), os.fsync

        def slow_fsync(file: int) -> None:
            if threading.current_thread() is not threading.main_thread():
                assert self.later.wait(30)
            fsync(file)

        os.fsync = slow_fsync

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            assert not self.last.is_file(), "the save of step 2 is under way"
            self.later.set()


@pytest.mark.slow
def test_training_goes_on_during_a_save_and_the_last_ones_stay(tmp_path: Path) -> None:
    run = Run(tmp_path, strategy="fsdp", save_every=2, validate_every=99, max_steps=6, keep=2)
    run.callbacks = [Slow(run.last)]
    result(run, 2)
    kept = {file.name: read_state(file)["global_step"] for file in (tmp_path / "checkpoints").glob("*.ckpt")}
    assert kept == {"last.ckpt": 6, "step_000004.ckpt": 4, "step_000006.ckpt": 6, "best.ckpt": kept["best.ckpt"]}
    folders = {folder.name: len(list(folder.iterdir())) for folder in (tmp_path / "checkpoints").glob("*.slices")}
    assert folders == {f"{name}.slices": 2 for name in kept}


def test_a_full_disk_of_one_rank_stops_all_with_the_save_of_before(tmp_path: Path) -> None:
    run = Run(tmp_path, "lora_unet", "fsdp", save_every=2, validate_every=99, callbacks=[FullFrom(3, 20_000, rank=1)])
    assert finish(start(run, 2)) == [WRONG] * 2
    assert read_state(run.last)["global_step"] == 2
    for rank in (0, 1):
        message = (tmp_path / f"error_{rank}.txt").read_text()
        assert re.match(rf"{slices_folder(run.last)}/step_000004\.\w+\.rank_1_of_2: the checkpoint cannot be", message)
        assert re.search(r"the previous last\.ckpt is intact. It needs \d\.\d MB, and [\d,.]+ MB are free", message)
    assert {file.name[:11] for file in slices_folder(run.last).iterdir()} == {"step_000002"}


class Warned(Preempt):
    """Listens in the process that trains; the scheduler's warning comes to one rank."""

    def __init__(self, run_dir: str):
        self.run_dir = run_dir

    def setup(self, *_: Any, **__: Any) -> None:
        super().__init__(self.run_dir)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_warned_run_leaves_when_its_save_is_whole(tmp_path: Path) -> None:
    run = Run(tmp_path, strategy="fsdp", save_every=99, validate_every=99, callbacks=[Warned(str(tmp_path))])
    assert finish(start(run, 2)) == [REQUEUE] * 2
    assert read_state(run.last)["global_step"] == 3
