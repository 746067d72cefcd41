"""How much each weight matters to the loss: the diagonal of the Fisher information, for `merge=fisher`.

Knows the gradients of a run and the file that it leaves; must not know what a merge makes of it.
"""

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
from sdft.models.sdxl import SDXL
from sdft.tuning.full import Full
from sdft.tuning.parameters import trainable_parameters


class Importance(L.Callback):
    """Averages the squared gradients of the weights that learn, over the steps of a run.

    A step's gradient is that of the mean loss of its samples, before clipping. Its square, times the number of samples,
    estimates the mean square of one sample's gradient, whatever the size of the batch and its division into parts.

    run_dir: importance.safetensors is written there at the end.
    """

    def __init__(self, run_dir: str):
        self.path = Path(run_dir) / FILE
        self.num_steps = 0
        self.sums: dict[str, Tensor] = {}
        self._learning: dict[str, nn.Parameter] = {}
        self._samples = 0
        """Of the step so far: a step may have several batches."""

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not isinstance(module.tuning, Full) or not isinstance(module.model, SDXL):
            raise UserError(
                "callbacks=importance: is of a model's own weights, and none of SDXL's learn here; of a LoRA, bake it "
                "(python -m sdft.merging merge=bake) and measure the result: docs/merging.md"
            )
        self._learning = dict(trainable_parameters(module.model))
        if any(isinstance(p, DTensor) for p in self._learning.values()):
            raise UserError("callbacks=importance: needs whole weights on each device; choose strategy=auto or ddp")
        zeros = {name: torch.zeros_like(p) for name, p in self._learning.items()}
        self.sums = zeros | {name: saved.to(zeros[name].device) for name, saved in self.sums.items()}

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Batch, *_: Any) -> None:
        self._samples += len(batch)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        seen, self._samples = self._samples * trainer.world_size, 0
        found = [(self.sums[name], p.grad) for name, p in self._learning.items() if p.grad is not None]
        sums, gradients = ([pair[i] for pair in found] for i in (0, 1))
        # 16-mixed leaves a step out when its gradients overflow; so does the average.
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
