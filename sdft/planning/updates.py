"""Memory of an optimizer: its states, and what an update holds for a moment, measured on small weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sdft.models.streaming import on_host
from sdft.planning.allocations import AllocationTracker
from sdft.tuning.parameters import trainable_parameters

PROBE = 2**18
"""Elements of a weight on which an optimizer's memory is measured."""

Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a weight."""


class OptimizerMemory(NamedTuple):
    """Bytes of the optimizer's states on the device and on the host, of one weight's update, of the optimizer step."""

    states: float
    hosted_states: float
    updates: dict[Kind, float]
    step: float


def optimizer_memory(module: Any, on_gpu: bool) -> OptimizerMemory:
    """What the optimizer holds. Weights that stay on the host are updated there, one at a time or not.

    Measured on small weights of the same shapes. Weights that are updated one at a time need the temporary memory of
    the largest; during the backward pass, that of each in turn.
    """
    counts, hosted = (
        Counter((tuple(p.shape), p.dtype) for p in group) for group in trained_here_and_there(module.model)
    )
    found = {kind: update_memory(module, *kind, on_gpu) for kind in counts | hosted}
    states, hosted_states = (sum(n * found[kind][0] for kind, n in group.items()) for group in (counts, hosted))
    updates = {kind: temporary for kind, (_, temporary) in found.items()}
    if module.fused_backward:
        return OptimizerMemory(states, hosted_states, updates, 0.0)
    if module.updates_parameterwise():
        return OptimizerMemory(states, hosted_states, updates, max((updates[kind] for kind in counts), default=0.0))
    # Multi-tensor updates hold the temporary memory of all weights at once, others that of one.
    largest = max(counts, key=updates.__getitem__)
    _, two = update_memory(module, *largest, on_gpu, count=2)
    if two < 1.5 * updates[largest]:
        return OptimizerMemory(states, hosted_states, updates, updates[largest])
    every = sum(count * updates[kind] for kind, count in counts.items())
    return OptimizerMemory(states, hosted_states, updates, every)


def trained_here_and_there(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters that are on the device, and those that stay on the host."""
    away, trained = on_host(model), [p for _, p in trainable_parameters(model)]
    return [p for p in trained if p not in away], [p for p in trained if p in away]


def update_memory(
    module: Any, shape: Sequence[int], dtype: torch.dtype, on_gpu: bool, count: int = 1
) -> tuple[float, float]:
    """(bytes of the states, temporary bytes of an update) of `count` equal weights; some rows stand for a large one."""
    rows = max(min(shape[0], PROBE // math.prod(shape[1:])), 1) if shape else 1
    scale = shape[0] / rows if shape else 1.0
    zeros = torch.zeros(rows, *shape[1:], dtype=dtype) if shape else torch.zeros((), dtype=dtype)
    weights = [nn.Parameter(zeros.clone()) for _ in range(count)]
    with torch.enable_grad():
        optimizer = module.optimizer_of([{"params": weights, "name": "probe", "lr_scale": 1.0}], in_backward=False)
    for group in optimizer.param_groups if on_gpu else ():
        if "fused" in group:
            group |= {"fused": True, "foreach": False}
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    states = tensors_of(optimizer)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    with AllocationTracker(tensors=[*states, *weights, *(w.grad for w in weights if w.grad is not None)]) as ledger:
        optimizer.step()
    return sum(t.nbytes for t in states) * scale, ledger.peak * scale


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of an optimizer's states."""
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


def update_in_backward(size: float) -> Callable[[Tensor], None]:
    """A hook that takes the bytes of a parameter's update for a moment, and frees the gradient."""

    def update(parameter: Tensor) -> None:
        torch.empty(round(size), dtype=torch.uint8)
        parameter.grad = None

    return update
