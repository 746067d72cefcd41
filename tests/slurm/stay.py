"""A callback for the jobs of the tests: it holds a run after a step until the test has done what it is about."""

from __future__ import annotations

import os
import time
from typing import Any

import lightning as L

from sdft.training.callbacks.preemption import Preempt
from sdft.types import Count, Index


class Stay(L.Callback):
    """Waits for a warning, or for the end of the process: a fast machine would be done before the test looks.

    after: the step. restarts: how often SLURM has queued the job again by then; at other times it does not wait.
    """

    def __init__(self, after: Count, restarts: Index = 0):
        self.after, self.restarts = after, restarts

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.after and int(os.environ.get("SLURM_RESTART_COUNT", 0)) == self.restarts:
            (preempt,) = (callback for callback in trainer.callbacks if isinstance(callback, Preempt))
            while preempt.received is None:
                time.sleep(0.05)
