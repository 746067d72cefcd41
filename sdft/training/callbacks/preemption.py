"""Signals that stop a run: it saves a checkpoint at the end of the step, says how to go on, and exits with their code.

| signal | from | exit code |
|---|---|---|
| SIGUSR1 | SLURM, before the time is over | 75, which asks for a requeue |
| SIGTERM | a cluster, `kill`, `docker stop` | 143 |
| SIGINT | Ctrl-C; a second one ends the process at once | 130 |
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L

from sdft.protocols import strategy_hooks

REQUEUE = 75
"""The exit status EX_TEMPFAIL: try again later."""
EXIT_CODES = {signal.SIGUSR1: REQUEUE, signal.SIGTERM: 143, signal.SIGINT: 130}


class Preempt(L.Callback):
    """After one of the signals, saves `checkpoints/last.ckpt` at the end of the step and exits with the signal's code.

    The handlers are installed when the callback is built, before weights are read. SIGTERM and SIGINT end the process
    at once before the first step and after the last one, when there is nothing to save.
    """

    def __init__(self, run_dir: str):
        self.run_dir = Path(run_dir)
        self.path = self.run_dir / "checkpoints" / "last.ckpt"
        self.received: signal.Signals | None = None
        self._training, self._over, self._step = False, False, 0
        self._install()

    def _install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        again = self.received is signal.SIGINT and number == signal.SIGINT
        self.received = signal.Signals(number)
        if again:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if command_name(sys.argv[0]) is None:  # in a notebook, whose process goes on
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)
        if self._training or (number == signal.SIGUSR1 and not self._over):
            if number == signal.SIGINT:
                say("stopping after this step; Ctrl-C again ends it at once")
            return
        if self.path.is_file():
            self._stop("stopped")
        say("stopped before a checkpoint was saved; the same command starts again")
        raise SystemExit(EXIT_CODES[self.received])

    def _stop(self, what: str) -> NoReturn:
        say(f"{what}\n  to go on: {resume_command(sys.argv, self.run_dir)}")
        raise SystemExit(EXIT_CODES[self.received or signal.SIGUSR1])

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # Lightning has put a handler of its own before ours, which stops processes at different steps.
        self._install()
        self._training, self._step = True, trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step in (self._step, trainer.max_steps):
            return
        self._step = trainer.global_step
        # Processes get the signal at different moments, and must stop after the same step.
        if trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            trainer.save_checkpoint(self.path, weights_only=False)
            strategy_hooks(trainer.strategy).wait_for_saves()
            first = trainer.strategy.broadcast(self.received, src=0)
            self.received = self.received or first
            if not trainer.is_global_zero:
                raise SystemExit(EXIT_CODES[self.received or signal.SIGUSR1])
            self._stop(f"stopped early: saved {self.path} after step {self._step}")

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """From here on a signal ends the process at once: the run goes on from its last checkpoint."""
        self._training, self._over = False, True
        if self.received is not None:
            self._stop("stopped after the last step, before the weights were exported")


def say(text: str) -> None:
    """Print below a progress bar."""
    print(f"\n{text}", flush=True)


def command_name(program: str) -> str | None:
    """How a program of this project was called; None if it is not one of them."""
    path = Path(program)
    if path.name == "__main__.py" and path.parent.parent.name == "sdft":
        return f"python -m sdft.{path.parent.name}"
    if path.name in ("train.py", "eval.py"):
        return f"python {shlex.quote(program)}"
    return path.name if path.name.startswith("sdft-") else None


def resume_command(argv: Sequence[str], run_dir: Path) -> str:
    """The command that goes on where this one ended: its own words, and where to resume.

    argv: of the process; if that is no command of sdft, only the settings are named.
    """
    name, words = command_name(argv[0]), argv[1:]
    own = {"resume": "auto"}
    if not any(word in ("-m", "--multirun", "hydra.mode=MULTIRUN") for word in words):
        own = {"run_dir": str(run_dir)} | own  # the jobs of a sweep have their own
        words = [word for word in words if not word.startswith("hydra.run.dir=")]
    kept = [word for word in words if word.partition("=")[0] not in own] if name else []
    added = [f"{key}={value}" for key, value in own.items()]
    return " ".join([*([name] if name else []), *map(shlex.quote, [*kept, *added])])
