"""Which checkpoints a run keeps, and how they are written and read."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import CheckpointIO

from sdft.errors import UserError
from sdft.formats.training_checkpoint import link_state, read_state, refuse_foreign, remove_state, write_state
from sdft.protocols import strategy_hooks
from sdft.types import Count

VALIDATION_METRIC = "val/eps_mse"


def last_checkpoint(run_dir: str | None, every: Count = 100, keep: Count = 1) -> ModelCheckpoint:
    """Keeps `checkpoints/last.ckpt`, from which `resume=` continues.

    every: optimizer steps between two saves; the last step is always saved.
    keep: number of saves to keep; earlier ones are named `step_000100.ckpt` and so on.
    """
    return LastCheckpoints(folder_of(run_dir), every, keep)


def best_checkpoint(run_dir: str | None, monitor: str = VALIDATION_METRIC, mode: Literal["min", "max"] = "min"):
    """Keeps `checkpoints/best.ckpt`, the one with the best value of `monitor`."""
    return ModelCheckpoint(
        folder_of(run_dir), filename="best", monitor=monitor, mode=mode, save_top_k=1, enable_version_counter=False
    )


def folder_of(run_dir: str | None) -> str:
    """The checkpoint folder of a run."""
    return str(Path(run_dir or ".") / "checkpoints")


def checkpoint_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step in a checkpoint folder."""
    return folder / f"step_{step:06d}.ckpt"


def link(path: Path, other: Path, remedy: str) -> None:
    """Hard-link a checkpoint to a second name. Raises UserError, with the remedy, where that is impossible."""
    try:
        link_state(path, other)
    except OSError as error:
        raise UserError(f"{other} cannot be linked ({error.strerror}); {remedy}") from error


class LastCheckpoints(ModelCheckpoint):
    """Saves `last.ckpt` and, with `keep` > 1, names the last saves by their step."""

    def __init__(self, folder: str, every: int, keep: int):
        super().__init__(folder, filename="last", every_n_train_steps=every, enable_version_counter=False)
        self.every, self.keep = every, keep

    @property
    def state_key(self) -> str:
        return type(self).__qualname__  # Lightning's includes `every`, which a resumed run may change

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        every = 1 if trainer.global_step == trainer.max_steps or trainer.should_stop else self.every
        self._every_n_train_steps = every
        super().on_train_batch_end(trainer, *args)
        if self.keep > 1 and trainer.is_global_zero and trainer.global_step % every == 0:
            keep = partial(keep_by_step, Path(str(self.dirpath)) / "last.ckpt", trainer.global_step, self.keep)
            strategy_hooks(trainer.strategy).after_save(keep)


def keep_by_step(last: Path, step: int, keep: int) -> None:
    """Hard-link the last save to a name with its step, and remove the oldest beyond `keep`."""
    by_step = checkpoint_of(last.parent, step)
    if not last.is_file() or (by_step.is_file() and by_step.samefile(last)):
        return
    link(last, by_step, "set callbacks.last.keep=1")
    kept = {file.with_name(file.name.removesuffix(".slices")) for file in last.parent.glob("step_*.ckpt*")}
    for old in sorted(kept)[:-keep]:
        remove_state(old)


class RunFiles(CheckpointIO):
    """Checkpoint I/O for Lightning: unlike its default, writes are atomic across disks and synced."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_state(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        state = read_state(Path(path))
        if not Path(path).name.startswith("."):  # in which launchers of Lightning bring weights back
            refuse_foreign(state, Path(path))
        return state

    def remove_checkpoint(self, path: str | Path) -> None:
        remove_state(Path(path))
