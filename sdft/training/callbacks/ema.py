"""Exponential moving average of the trainable parameters, used in validation, previews and the exported weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Ge, Lt
from torch import Tensor

from sdft.distributed.sharding import local_shard
from sdft.optimizers.optimizers import averages_weights
from sdft.protocols import WeightAverage
from sdft.training.callbacks.averaged import copied_parameters
from sdft.tuning.parameters import copy_parameters, swap_parameters, trainable_parameters


class EMA(WeightAverage, L.Callback):
    """Averages the trainable parameters after each optimizer step; each rank averages its own shards.

    Lightning's `EMAWeightAveraging` (2.6) is not used:
    - torch's `AveragedModel`, which it wraps, deep-copies the whole module: with an adapter, a second SDXL in memory.
    - It does not shard: it calls `configure_model` itself before the strategy does, and warns of it.
    - A checkpoint gets all weights twice, frozen ones included: the average as `state_dict`, the live weights under
      `current_model_state`, which is added after the filters for trainable parameters could apply to it.
    - Its decay is constant. From a copy of the first step's weights, 240 steps at 0.999 leave 79% of that copy.

    With a schedule-free optimizer nothing is averaged here: its own average takes the place.

    decay: of the average. After n steps it is at most (1 + n) / (10 + n), so that the first steps soon lose weight.
    offload: keep the average in the memory of the machine, and copy the parameters there after each step.
    """

    def __init__(self, decay: Annotated[float, Ge(0), Lt(1)] = 0.999, offload: bool = False):
        self.decay, self.offload = decay, offload
        self.num_updates = 0
        self.average: dict[str, Tensor] = {}
        self._trained: list[Tensor] = []
        self._idle, self._live = False, dict[str, Tensor]()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # Not in on_fit_start: FSDP restores the checkpoint, and with it the average, after that.
        self._idle = averages_weights(trainer.optimizers[0])
        if self._idle:
            return
        self._trained = [p for _, p in trainable_parameters(module.model)]
        self.average = copied_parameters(module.model, self.average, self.offload, "callbacks.ema")

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self._idle or trainer.global_step == self.num_updates:
            return
        self.num_updates = trainer.global_step
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages = [local_shard(value) for value in self.average.values()]
        trained = [local_shard(p) for p in self._trained]
        if all(p.dtype == a.dtype and p.device == a.device for p, a in zip(trained, averages, strict=True)):
            torch._foreach_lerp_(averages, trained, 1 - decay)
            return
        for average, p in zip(averages, trained, strict=True):
            average.lerp_(p.to(average), 1 - decay)

    @contextmanager
    def averaged(self, module: L.LightningModule) -> Iterator[None]:
        """Inside the `with`, the model has the averaged parameters."""
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    def _swap(self, module: L.LightningModule) -> None:
        """Exchange the averaged parameters and the trained ones."""
        if not self._idle:
            swap_parameters(module.model, self.average, self._live)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._swap(module)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._swap(module)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self._idle:
            copy_parameters(module.model, self.average)

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates, self.average = state["num_updates"], state["average"]
