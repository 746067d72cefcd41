"""Ends a run right after its first step, to measure the time to it."""

from __future__ import annotations

import os
from typing import Any

import lightning as L


class StopAtFirstStep(L.Callback):
    """Exits the process at once: what follows the first step is not measured."""

    def on_train_batch_end(self, *_: Any) -> None:
        os._exit(0)
