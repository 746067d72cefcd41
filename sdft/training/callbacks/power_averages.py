"""Keeps averages of the trainable parameters whose width is chosen after the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Gt, Le, Len
from torch import Tensor

from sdft.distributed.sharding import gather_weights, local_shard
from sdft.errors import UserError
from sdft.formats.power_average import FOLDER, MAX_WIDTH, decay, exponent, snapshot_steps, write_averages
from sdft.optimizers.optimizers import averages_weights
from sdft.protocols import KeepsAverages
from sdft.training.callbacks.averaged import copied_parameters
from sdft.tuning.parameters import trainable_parameters
from sdft.types import Count

Width = Annotated[float, Gt(0), Le(MAX_WIDTH)]


class PowerAverages(KeepsAverages, L.Callback):
    """Keeps two power-function averages, and writes copies of both at `count` steps to `averages/` in the run folder.

    From them `python eval.py 'axes.width=[0.05,0.1,0.2]'` rebuilds any width. The run itself uses another average
    (`EMA`), or none. See `sdft.formats.power_average`; each rank averages its own shards.

    run_dir: the run folder.
    widths: of the two averages: standard deviations of their profiles relative to the steps so far. 0.05 and 0.1 are
        those of the paper.
    count: copies of each; 16 rebuild widths from 0.04 to 0.2 to 0.1 % of the weights. A copy takes 4 bytes for
        each parameter.
    offload: keep the averages in the memory of the machine, and copy the parameters there after each step.

    Raises UserError with an optimizer that averages by itself.
    """

    num_averages = 2

    def __init__(
        self,
        run_dir: str,
        widths: Annotated[Sequence[Width], Len(2, 2)] = (0.05, 0.1),
        count: Count = 16,
        offload: bool = False,
    ):
        self.folder, self.widths, self.count, self.offload = Path(run_dir) / FOLDER, tuple(widths), count, offload
        self.exponents = [exponent(width) for width in self.widths]
        self.averages: dict[float, dict[str, Tensor]] = {}
        self.num_updates = 0

    @property
    def state_key(self) -> str:
        return self._generate_state_key(widths=self.widths)  # a run may keep several pairs

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if averages_weights(trainer.optimizers[0]):
            raise UserError("callbacks.power_averages: a schedule-free optimizer averages by itself; remove one")
        self.averages = {
            width: copied_parameters(
                module.model, self.averages.get(width, {}), self.offload, "callbacks.power_averages"
            )
            for width in self.widths
        }
        if trainer.is_global_zero:
            for file in self.folder.glob("step_*.safetensors"):  # of a run that this one replaces, or goes back of
                if int(file.stem.removeprefix("step_")) > trainer.global_step:
                    file.unlink()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self.num_updates:
            return
        self.num_updates = step
        device = "cpu" if self.offload else module.device
        trained = [local_shard(p).to(device, torch.float32) for _, p in trainable_parameters(module.model)]
        for g, own in zip(self.exponents, self.averages.values(), strict=True):
            averages = [local_shard(value) for value in own.values()]
            torch._foreach_lerp_(averages, trained, 1 - decay(g, step))
        if step in snapshot_steps(self.count, trainer.max_steps):
            whole = {width: gather_weights(own) for width, own in self.averages.items()}
            if trainer.is_global_zero:
                write_averages(self.folder / f"step_{step:06d}.safetensors", whole)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "averages": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates, self.averages = state["num_updates"], state["averages"]
