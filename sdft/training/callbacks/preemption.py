"""Stops a run in good order when its scheduler warns it: a checkpoint at the end of a step, and a status that asks for
the run to be queued again. Knows one signal; must not know who sends it or who starts the run again.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L

AGAIN = 75
"""The exit status for "try again later" (EX_TEMPFAIL)."""


class Preempt(L.Callback):
    """After USR1, saves `checkpoints/last.ckpt` at the end of the step and ends the process with status 75.

    It listens from the moment it is built, before any weights are read. Lightning's own handler, which saves wherever
    the step happens to be, steps back where there is one already.
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
        # The processes hear it at different moments, and must stop after the same step.
        if trainer.strategy.reduce_boolean_decision(self.warned, all=False):
            trainer.save_checkpoint(self.path)
            getattr(trainer.strategy, "wait", lambda: None)()
            if trainer.is_global_zero:
                print(f"\nstopped early: saved {self.path} after step {self._step}", flush=True)
            raise SystemExit(AGAIN)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # What follows saves nothing: a warning then ends the process, and the run goes on from its last checkpoint.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
