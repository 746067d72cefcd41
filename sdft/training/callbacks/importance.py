"""The diagonal of the Fisher information of each weight (its importance), for `merge=fisher`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sdft.batch import Batch
from sdft.errors import UserError
from sdft.formats.importance import FILE, write_importance
from sdft.protocols import DiffusionModel
from sdft.tuning.parameters import trainable_parameters


class Importance(L.Callback):
    """Averages the squared gradients of the trainable parameters over the steps of a run.

    A step's gradient is that of the mean loss of its samples, before clipping. Its square, times the number of samples,
    estimates the mean squared gradient of one sample, whatever the batch size, accumulation and number of processes.

    run_dir: importance.safetensors is written there at the end.
    """

    def __init__(self, run_dir: str):
        self.path = Path(run_dir) / FILE
        self.num_steps = 0
        self.sums: dict[str, Tensor] = {}
        self._trained: dict[str, nn.Parameter] = {}
        self._samples = 0
        """Samples of the current step, which may have several batches."""

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if module.tuning.trains_adapters or not isinstance(module.model, DiffusionModel):
            raise UserError(
                "callbacks=importance: measures the weights of a whole model, and this run does not train one; bake a "
                "LoRA first (python -m sdft.merging merge=bake): docs/merging.md"
            )
        if module.fused_backward:
            raise UserError("callbacks=importance: needs all gradients at once; set fused_backward=false")
        self._trained = dict(trainable_parameters(module.model))
        if any(isinstance(p, DTensor) for p in self._trained.values()):
            raise UserError("callbacks=importance: needs whole weights on each device; choose strategy=auto or ddp")
        zeros = {name: torch.zeros_like(p) for name, p in self._trained.items()}
        self.sums = zeros | {name: saved.to(zeros[name].device) for name, saved in self.sums.items()}

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, *_: Any) -> None:
        self._samples += len(batch)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        seen, self._samples = self._samples * trainer.world_size, 0
        found = [(self.sums[name], p.grad) for name, p in self._trained.items() if p.grad is not None]
        sums, gradients = ([pair[i] for pair in found] for i in (0, 1))
        # 16-mixed skips a step whose gradients overflow; so does the average.
        if torch.stack(torch._foreach_norm(gradients)).isfinite().all():
            torch._foreach_addcmul_(sums, gradients, gradients, value=float(seen))
            self.num_steps += 1

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.num_steps:
            write_importance({name: total / self.num_steps for name, total in self.sums.items()}, self.path)

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_steps, self.sums = state["num_steps"], state["sums"]
