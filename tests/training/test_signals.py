"""SIGTERM and Ctrl-C save a checkpoint, say how to go on, and end with a code that says that the run is not done."""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from small_runs import Run, finish, start, train_py

from sdft.formats.training_checkpoint import read_state
from sdft.training.callbacks.preemption import command_name, resume_command

WORDS = [
    *("trainer.max_steps=6", "trainer.validate_every=6", "verdict=none", "~callbacks.previews", "logger=csv"),
    *("trainer.progress_bar=false", "data.batch_size=2", "data.train.num_scenes=4", "data.validation.num_scenes=2"),
]


class Signals(L.Callback):
    """Sends signals to its own process after a step, or at another moment of the run."""

    def __init__(self, numbers: list[int], place: str = "on_train_batch_start", step: int = 2):
        self.numbers, self.place, self.step = numbers, place, step

    def _at(self, place: str, step: int) -> None:
        if place == self.place and step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.01)  # a handler of Python runs between two of its instructions

    def on_fit_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("on_fit_start", self.step)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("on_train_batch_start", trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._at("on_train_batch_end", trainer.global_step)


def saved_step(run: Run) -> int:
    return read_state(run.last)["global_step"] if run.last.is_file() else 0


def train_into_file(words: list[str], run: Run) -> None:
    """The command in this process, with what it prints in `printed.txt`."""
    file = os.open(run.folder / "printed.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    train_py(words, run)


def trained(folder: Path, *words: str) -> tuple[int, str]:
    """Exit status of `train.py`, and all that it printed."""
    status = finish(start(Run(folder), function=partial(train_into_file, [*WORDS, *words])))
    return status[0], (folder / "printed.txt").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 75)])
def test_a_stopped_run_saves_and_says_how_to_go_on(number: int, code: int, tmp_path: Path) -> None:
    run = Run(tmp_path)
    sends = f"+callbacks.sends={{_target_: test_signals.Signals, numbers: [{int(number)}]}}"
    status, printed = trained(tmp_path, sends)
    assert status == code
    assert saved_step(run) == 3
    assert not (tmp_path / ".lock").exists()
    assert f"stopped early: saved {run.last} after step 3\n  to go on: python " in printed
    again = printed.split("to go on: ")[1].splitlines()[0]
    assert again.endswith(f"run_dir={tmp_path} resume=auto")
    assert "trainer.max_steps=6" in again
    assert "Traceback" not in printed


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    status, printed = trained(tmp_path, "+callbacks.sends={_target_: test_signals.Signals, numbers: [2, 2]}")
    assert status == -signal.SIGINT
    assert saved_step(Run(tmp_path)) == 0
    assert "stopping after this step; Ctrl-C again ends it at once" in printed


@pytest.mark.parametrize(
    ("place", "step", "saved", "message"),
    [
        ("on_fit_start", 0, 0, "stopped before a checkpoint was saved; the same command starts again"),
        ("on_train_batch_end", 6, 6, "stopped after the last step, before the weights were exported\n  to go on: "),
    ],
)
def test_before_and_after_the_steps_there_is_nothing_to_save(
    place: str, step: int, saved: int, message: str, tmp_path: Path
) -> None:
    sends = f"+callbacks.sends={{_target_: test_signals.Signals, numbers: [15], place: {place}, step: {step}}}"
    status, printed = trained(tmp_path, sends)
    assert status == 143, printed
    assert saved_step(Run(tmp_path)) == saved
    assert message in printed
    assert trained(tmp_path, "resume=auto")[0] == 0
    assert (tmp_path / "lora.safetensors").is_file()


def test_while_exporting_the_checkpoint_stays(tmp_path: Path) -> None:
    words = ["verdict=style", "verdict._target_=test_signals.stopping", "+verdict._partial_=true"]
    status, printed = trained(tmp_path, *words)
    assert status == 143, printed
    assert saved_step(Run(tmp_path)) == 6
    assert "stopped\n  to go on: python " in printed


def stopping(*_: Any, **__: Any) -> None:
    """An evaluation after training that is told to stop."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


class FullAtTheEnd(L.Callback):
    """When all steps are done, no file can grow past some bytes."""

    def on_fit_end(self, *_: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def test_an_export_on_a_full_disk_is_finished_later_without_training_again(tmp_path: Path) -> None:
    status, printed = trained(tmp_path, "+callbacks.full={_target_: test_signals.FullAtTheEnd}")
    assert status == 2, printed
    last = tmp_path / "checkpoints" / "last.ckpt"
    (line,) = (line for line in printed.splitlines() if line.startswith("error"))
    assert re.search(rf"{tmp_path}/lora\.safetensors: .* are free there \(File too large\); make room", line)
    assert f"{last} is intact; this exports it without training again: python " in line
    assert line.endswith(f"run_dir={tmp_path} resume=auto")
    assert not (tmp_path / "lora.safetensors").exists()
    saved = last.read_bytes()
    status, printed = trained(tmp_path, "resume=auto")
    assert status == 0, printed
    assert (tmp_path / "lora.safetensors").is_file()
    assert last.read_bytes() == saved, "nothing was trained"


COMMANDS = {
    "a script": (["train.py", "rank=4", "resume=null"], "python train.py rank=4 run_dir=r resume=auto"),
    "a module": (["/x/sdft/training/__main__.py", "run_dir=a"], "python -m sdft.training run_dir=r resume=auto"),
    "an installed command": (["/v/bin/sdft-train"], "sdft-train run_dir=r resume=auto"),
    "quotes": (["train.py", "caption=a, b"], "python train.py 'caption=a, b' run_dir=r resume=auto"),
    "a planned folder": (["train.py", "rank=4", "hydra.run.dir='r'"], "python train.py rank=4 run_dir=r resume=auto"),
    "a sweep": (["train.py", "hydra.mode=MULTIRUN"], "python train.py hydra.mode=MULTIRUN resume=auto"),
    "a notebook": (["/x/ipykernel_launcher.py", "-f", "x.json"], "run_dir=r resume=auto"),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_the_command_that_goes_on(kind: str) -> None:
    argv, command = COMMANDS[kind]
    assert resume_command(argv, Path("r")) == command
    assert (command_name(argv[0]) is None) == (kind == "a notebook")
