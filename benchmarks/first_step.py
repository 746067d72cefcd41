"""Ends a run right after its first step, for timing the way there."""

from __future__ import annotations

import os
from typing import Any

import lightning as L


class StopAtFirstStep(L.Callback):
    """Leaves the process at once: what follows the first step is not the way to it."""

    def on_train_batch_end(self, *_: Any) -> None:
        os._exit(0)
