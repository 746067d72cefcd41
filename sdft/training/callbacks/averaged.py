"""Averages of the trainable parameters: new ones, and the weights that pictures during training are drawn with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sdft.distributed.sharding import shard_like
from sdft.errors import UserError
from sdft.protocols import WeightAverage
from sdft.tuning.parameters import trainable_parameters


def copied_parameters(model: nn.Module, saved: Mapping[str, Tensor], offload: bool, key: str) -> dict[str, Tensor]:
    """fp32 copies of the trainable parameters for an average to start from, with the values of a checkpoint in them.

    In fp32: an average of bf16 weights would not move by a thousandth of their distance. Each rank has its own shards.

    saved: name -> value, whole or sharded; empty for a new run. offload: keep them in the memory of the machine.
    key: of the callback in the config. Raises UserError for `offload` with sharded weights.
    """
    if offload and any(isinstance(p, DTensor) for p in model.parameters()):
        raise UserError(f"{key}.offload=true: sharded weights are averaged where they are; set it to false")
    found = {}
    for name, p in trainable_parameters(model):
        copy = p.detach().to(torch.float32, copy=True)
        found[name] = copy.cpu() if offload else copy
    for name, value in saved.items():
        found[name].copy_(shard_like(found[name], value))
    return found


@contextmanager
def averaged_weights(trainer: L.Trainer, module: Any) -> Iterator[None]:
    """Inside the `with`, the model has the averaged parameters, if a callback or the optimizer keeps an average."""
    averages = [callback for callback in trainer.callbacks if isinstance(callback, WeightAverage)]
    with ExitStack() as stack:
        for average in averages[:1]:
            stack.enter_context(average.averaged(module))
        stack.enter_context(module.averaged_by_optimizer())
        yield
