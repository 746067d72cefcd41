"""The Lightning Trainer with the switches that mean something here, and its checkpoints."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.plugins import CheckpointIO

from sdft.formats.run_state import link_state, read_state, remove_state, write_state
from sdft.types import Count, NonNegative, UserError

# Raised inside Lightning 2.6 by torch 2.13 at every step; goes with the Lightning release that drops LeafSpec.
warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
# One process here serves pictures faster than workers do; `data.num_workers` is the knob, and the README names it.
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)

for noise in (
    ".*smaller than the logging interval.*",
    ".*Experiment logs directory.*",  # hydra has written its own files into the run folder
    ".*Checkpoint directory .* exists and is not empty.*",  # as after every resume
    ".*ended before the epoch ended and your dataloader is not resumable.*",  # it is: see data.dataset.RunOrder
):
    warnings.filterwarnings("ignore", message=noise)

VALIDATION_FIGURE = "val/eps_mse"


def trainer(
    max_steps: Count,
    validate_every: Count = 100,
    accumulate_grad_batches: Count = 1,
    gradient_clip_val: NonNegative = 1.0,
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] = "32-true",
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    devices: int | Literal["auto"] = "auto",
    num_nodes: Count = 1,
    log_every: Count = 10,
    progress_bar: bool = True,
    strategy: Any = "auto",
    callbacks: Sequence[L.Callback] = (),
    loggers: Sequence[Any] = (),
    run_dir: str | None = None,
) -> L.Trainer:
    """A Trainer.

    max_steps: optimiser steps.
    validate_every: optimiser steps between two validations.
    accumulate_grad_batches: batches of one optimiser step.
    gradient_clip_val: largest norm of the gradient; 0 clips nothing.
    devices, num_nodes: processes of one node, and nodes.
    log_every: optimiser steps between two logged figures.
    """
    if not torch.cuda.is_available():
        # This switch governs the CPU kernel too, whose backward was a third of nano's step.
        torch.backends.cuda.enable_flash_sdp(False)
    return L.Trainer(
        max_steps=max_steps,
        max_epochs=1,  # The run is one endless sequence of samples: see data.dataset.RunOrder.
        val_check_interval=min(validate_every, max_steps) * accumulate_grad_batches,
        accumulate_grad_batches=accumulate_grad_batches,
        gradient_clip_val=gradient_clip_val or None,
        precision=precision,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        log_every_n_steps=log_every,
        enable_progress_bar=progress_bar,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        inference_mode=False,  # Validation would put shards together into tensors that training could not use again.
        strategy=strategy,
        plugins=[RunFiles()],
        callbacks=[*callbacks, *([Progress()] if progress_bar else [])],
        logger=list(loggers),
        use_distributed_sampler=False,
        default_root_dir=run_dir,
    )


def last_checkpoint(run_dir: str | None, every: Count = 100, keep: Count = 1) -> ModelCheckpoint:
    """Keeps `checkpoints/last.ckpt`, from which `resume=` goes on.

    every: optimiser steps between two saves; the last step is saved too.
    keep: how many saves stay; those before the last are `step_000100.ckpt` and so on.
    """
    return LastCheckpoints(folder_of(run_dir), every, keep)


def best_checkpoint(run_dir: str | None, monitor: str = VALIDATION_FIGURE, mode: Literal["min", "max"] = "min"):
    """Keeps `checkpoints/best.ckpt`, the one with the best validation figure."""
    return ModelCheckpoint(
        folder_of(run_dir), filename="best", monitor=monitor, mode=mode, save_top_k=1, enable_version_counter=False
    )


def folder_of(run_dir: str | None) -> str:
    """Where a run keeps its checkpoints."""
    return str(Path(run_dir or ".") / "checkpoints")


class LastCheckpoints(ModelCheckpoint):
    """The last save under a name that does not change, and with the ones before it also by its step."""

    def __init__(self, folder: str, every: int, keep: int):
        super().__init__(folder, filename="last", every_n_train_steps=every, enable_version_counter=False)
        self.every, self.keep = every, keep

    @property
    def state_key(self) -> str:
        return type(self).__qualname__  # Lightning's own says how often is saved, which a resumed run may change

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        every = 1 if trainer.global_step == trainer.max_steps else self.every
        self._every_n_train_steps = every
        super().on_train_batch_end(trainer, *args)
        if self.keep > 1 and trainer.is_global_zero and trainer.global_step % every == 0:
            keep = partial(keep_by_step, Path(str(self.dirpath)) / "last.ckpt", trainer.global_step, self.keep)
            once_saved = getattr(trainer.strategy, "once_saved", None)
            once_saved(keep) if once_saved else keep()


def keep_by_step(last: Path, step: int, keep: int) -> None:
    """Give the last save a second name, and drop the oldest; a name takes no space."""
    by_step = last.with_name(f"step_{step:06d}.ckpt")
    if not last.is_file() or (by_step.is_file() and by_step.samefile(last)):
        return
    try:
        link_state(last, by_step)
    except OSError as error:
        raise UserError(f"{by_step} cannot be made ({error.strerror}); set callbacks.last.keep=1") from error
    kept = {file.with_name(file.name.removesuffix(".slices")) for file in last.parent.glob("step_*.ckpt*")}
    for old in sorted(kept)[:-keep]:
        remove_state(old)


class RunFiles(CheckpointIO):
    """How Lightning's checkpoints come to disk and back: its own way is neither atomic between disks nor synced."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_state(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_state(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        remove_state(Path(path))


class Progress(TQDMProgressBar):
    """One line: steps, rate, time left, loss. A resumed run starts where it stopped, and so does its rate."""

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_start(trainer, *_)
        self._span(trainer)

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer, *_)
        self._span(trainer)

    def _span(self, trainer: L.Trainer) -> None:
        bar = self.train_progress_bar
        bar.set_description("training")
        bar.total = trainer.max_steps * trainer.accumulate_grad_batches
        bar.initial = bar.n = trainer.global_step * trainer.accumulate_grad_batches

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(*args).items() if name != "v_num"}
