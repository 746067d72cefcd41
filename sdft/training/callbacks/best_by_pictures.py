"""`best.ckpt` by what was measured on pictures, instead of by the loss."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning as L

from sdft.board.curves import WATCHED
from sdft.choosing.decide import Decision
from sdft.evaluation.stopping import Limits
from sdft.protocols import strategy_hooks
from sdft.training.callbacks.watch import read_measurements
from sdft.training.checkpoints import checkpoint_of, folder_of, link


class BestByPictures(L.Callback):
    """At the end of training, makes `checkpoints/best.ckpt` the checkpoint that learned most within the limits,
    or one that costs detectably less and has learned as much (`sdft.choosing.decide`); none if none is better than
    the base. The callback `watch` measures, and keeps the checkpoints with `callbacks.watch.keep`.

    run_dir: the run folder.
    limits: what a checkpoint may cost.
    """

    def __init__(self, run_dir: str, limits: Limits | None = None):
        self.run_dir, self.limits = run_dir, limits or Limits()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            strategy_hooks(trainer.strategy).after_save(partial(self._link, trainer.max_steps))

    def _link(self, max_steps: int) -> None:
        history = read_measurements(Path(self.run_dir) / WATCHED)
        if len(history) < 2 or history[0].look is None:
            return
        recommended = Decision(history[0], history[1:], self.limits).choice().recommended
        if recommended is None:
            return
        folder = Path(folder_of(self.run_dir))
        is_last = recommended.step == max_steps
        source = folder / "last.ckpt" if is_last else checkpoint_of(folder, recommended.step)
        if source.is_file():
            link(source, folder / "best.ckpt", "pass '~callbacks.best'")
