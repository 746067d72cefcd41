"""Images of the same prompts and seeds during training, beside those of the base model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from sdft.errors import UserError
from sdft.evaluation.image_grid import save_grid
from sdft.hardware import autocast_precision
from sdft.protocols import WeightAverage, strategy_hooks
from sdft.sampling.generate import generate
from sdft.sampling.samplers import Sampler
from sdft.training.callbacks.tracking import log_picture
from sdft.types import Count, Precision


class Previews(L.Callback):
    """Draws `prompts` during training, with the averaged parameters if a callback keeps an average.

    run_dir: images are written to `previews/` in it.
    every: optimizer steps between two previews.
    size: side of the images, in pixels.
    """

    def __init__(self, run_dir: str, prompts: Sequence[str], sampler: Sampler, size: Count, every: Count = 200):
        if not prompts:
            raise UserError("callbacks.previews.prompts is empty: give at least one prompt")
        self.folder, self.prompts, self.sampler = Path(run_dir) / "previews", list(prompts), sampler
        self.size, self.every = size, every
        self._base: np.ndarray | None = None
        self._last = 0

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._last or step % self.every or step == trainer.max_steps:
            return
        self._last = step
        # Sharded weights are gathered only if all ranks compute.
        if trainer.is_global_zero or strategy_hooks(trainer.strategy).num_shards(trainer.world_size) > 1:
            self._draw(trainer, module, step)

    def _draw(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        precision = autocast_precision(trainer.precision)
        if self._base is None:
            with module.tuning.base(module.model):
                self._base = self._pictures(module, precision)
        averages = [callback for callback in trainer.callbacks if isinstance(callback, WeightAverage)]
        with ExitStack() as stack:
            for average in averages[:1]:
                stack.enter_context(average.averaged(module))
            stack.enter_context(module.averaged_by_optimizer())
            now = self._pictures(module, precision)
        if not trainer.is_global_zero:
            return
        path = self.folder / f"step_{step:06d}.png"
        save_grid(path, [self._base, now], ["base", f"step {step}"], self.prompts)
        log_picture(trainer, "previews", path, step)

    def _pictures(self, module: L.LightningModule, precision: Precision) -> np.ndarray:
        seeds = range(len(self.prompts))
        return generate(module.model, self.prompts, seeds, self.sampler, (self.size, self.size), precision)
