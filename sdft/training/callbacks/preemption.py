"""Saves a checkpoint and exits when the job scheduler sends SIGUSR1, with a status that asks for a requeue."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L

from sdft.protocols import strategy_hooks

REQUEUE = 75
"""The exit status EX_TEMPFAIL: try again later."""


class Preempt(L.Callback):
    """After SIGUSR1, saves `checkpoints/last.ckpt` at the end of the step and exits with status 75.

    The handler is installed when the callback is built, before weights are read. Lightning does not install its own,
    which would save in the middle of a step, if there is one already.
    """

    def __init__(self, run_dir: str):
        self.path = Path(run_dir) / "checkpoints" / "last.ckpt"
        self.warned = False
        self._step = 0
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self._warn)

    def _warn(self, *_: Any) -> None:
        self.warned = True

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step in (self._step, trainer.max_steps):
            return
        self._step = trainer.global_step
        # Processes get the signal at different moments, and must stop after the same step.
        if trainer.strategy.reduce_boolean_decision(self.warned, all=False):
            trainer.save_checkpoint(self.path)
            strategy_hooks(trainer.strategy).wait_for_saves()
            if trainer.is_global_zero:
                print(f"\nstopped early: saved {self.path} after step {self._step}", flush=True)
            raise SystemExit(REQUEUE)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # Nothing is saved after this: the signal ends the process, and the run resumes from its last checkpoint.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
