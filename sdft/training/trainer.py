"""The Lightning Trainer, with the arguments that have a meaning here."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar

from sdft.errors import UserError
from sdft.hardware import default_precision, num_gpus
from sdft.progress import are_shown
from sdft.training.checkpoints import RunFiles
from sdft.training.lagged import LaggedScalar
from sdft.types import Count, Devices, NonNegative, NumNodes

# Raised inside Lightning 2.6 by torch 2.13 at every step; goes with the Lightning release that drops LeafSpec.
warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
# Loading in the main process is faster here for small images; `data.num_workers` sets the number of workers.
warnings.filterwarnings("ignore", message=".*does not have many workers.*")
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
for noise in (
    ".*smaller than the logging interval.*",
    ".*Experiment logs directory.*",  # hydra has written its own files into the run folder
    ".*Checkpoint directory .* exists and is not empty.*",  # as after every resume
    ".*ended before the epoch ended and your dataloader is not resumable.*",  # it is: see data.dataset.RunOrder
):
    warnings.filterwarnings("ignore", message=noise)


LAUNCHERS = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR")
"""Environment variables of which torchrun, srun or the user's own script sets one."""


def trainer(
    max_steps: Count,
    validate_every: Count = 100,
    accumulate_grad_batches: Count = 1,
    gradient_clip_val: NonNegative = 1.0,
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto",
    accelerator: Literal["auto", "cpu", "gpu"] = "auto",
    devices: Devices = "auto",
    num_nodes: NumNodes = 1,
    log_every: Count = 10,
    progress_bar: bool = True,
    deterministic: bool | Literal["warn"] = True,
    strategy: Any = "auto",
    callbacks: Sequence[L.Callback] = (),
    loggers: Sequence[Any] = (),
    run_dir: str | None = None,
) -> L.Trainer:
    """A Trainer.

    max_steps: optimizer steps.
    validate_every: optimizer steps between two validations.
    accumulate_grad_batches: batches of one optimizer step.
    gradient_clip_val: largest norm of the gradient; 0 clips nothing.
    precision: `auto` is bf16-mixed where the device computes bf16 natively (see `sdft.hardware.default_precision`).
    devices, num_nodes: processes per node, and nodes.
    log_every: optimizer steps between logged values.
    deterministic: on a GPU, use only kernels that give the same bits each time (`torch.use_deterministic_algorithms`).
        Without them a repeated or resumed run ends with other weights. `warn` warns of operations that have no such
        kernel instead of ending with an error. Kernels of a CPU always give the same bits here.
    """
    refuse_missing_devices(accelerator, devices, num_nodes)
    progress_bar = progress_bar and are_shown()
    on_gpu = num_gpus(accelerator) > 0
    torch.utils.deterministic.fill_uninitialized_memory = False  # Costs time, and nothing reads such memory.
    if not torch.cuda.is_available():
        # This switch also disables the CPU kernel, whose backward pass took a third of nano's step.
        torch.backends.cuda.enable_flash_sdp(False)
    return L.Trainer(
        max_steps=max_steps,
        max_epochs=1,  # The run is one sequence of samples: see data.dataset.RunOrder.
        val_check_interval=min(validate_every, max_steps) * accumulate_grad_batches,
        accumulate_grad_batches=accumulate_grad_batches,
        gradient_clip_val=gradient_clip_val or None,
        precision=default_precision(on_gpu) if precision == "auto" else precision,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        log_every_n_steps=log_every,
        enable_progress_bar=progress_bar,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        inference_mode=False,  # Weights that FSDP gathers in inference mode could not be used in training.
        strategy=strategy,
        plugins=[RunFiles()],
        callbacks=[*callbacks, *([Progress()] if progress_bar else [])],
        logger=list(loggers),
        use_distributed_sampler=False,
        deterministic=deterministic if on_gpu else None,
        default_root_dir=run_dir,
    )


def refuse_missing_devices(accelerator: str, devices: Devices, num_nodes: int) -> None:
    """Raise UserError for GPUs that this machine lacks, and for other machines that nobody starts.

    Lightning would wait for these for ever.
    """
    found = num_gpus(accelerator)
    if accelerator == "gpu" and not found:
        raise UserError("trainer.accelerator=gpu: there is no GPU here that torch can use; set auto or cpu")
    if found and isinstance(devices, int) and devices > found:
        raise UserError(f"trainer.devices={devices}: this machine has {found}; set a lower number, or auto")
    if num_nodes > 1 and not any(name in os.environ for name in LAUNCHERS):
        raise UserError(
            f"trainer.num_nodes={num_nodes}: a launcher, srun or torchrun, starts the processes of several machines "
            "(docs/cluster.md), and none did"
        )


class Progress(TQDMProgressBar):
    """Steps, rate, remaining time and loss in one line; after a resume it starts at the resumed step."""

    lags: bool | None = None
    """Whether the loss is that of the step before; if None, on GPUs."""
    _latest: LaggedScalar | None = None
    _shown: LaggedScalar | None = None

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

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        # Not logged with `prog_bar=True`, which waits for the loss at every step.
        latest = LaggedScalar(module.latest.mean_loss)
        lags = module.device.type == "cuda" if self.lags is None else self.lags
        self._shown, self._latest = self._latest if lags and self._latest else latest, latest
        super().on_train_batch_end(trainer, module, *args)

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        metrics = {name: value for name, value in super().get_metrics(*args).items() if name != "v_num"}
        return metrics | ({"loss": self._shown.read()} if self._shown else {})
