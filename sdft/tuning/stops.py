"""Parts that stop training before the run ends: text encoders, or the words of pivotal tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from sdft.errors import UserError
from sdft.tuning.parameters import part_of, trainable_parameters


def read_stops(stop_at: Mapping[str, float] | None, trained: Sequence[str]) -> dict[str, float]:
    """The share of the run's steps after which each part is frozen.

    Raises UserError for parts that are not trained, and if no part is left to the end.
    """
    stops = dict(stop_at or {})
    if unknown := sorted(set(stops) - set(trained)):
        raise UserError(f"tuning.stop_at names {unknown}; the trained parts are {sorted(trained)}")
    if stops and all(stops.get(part, 1.0) < 1 for part in trained):
        raise UserError("tuning.stop_at: some part has to train to the end; leave one out, or lower trainer.max_steps")
    return stops


def drop_gradients(model: nn.Module, stop_at: Mapping[str, float], progress: float) -> None:
    """Take the gradients of the parts that have stopped, so that no optimizer changes them.

    progress: share of the run's steps that are done.
    """
    stopped = {part for part, share in stop_at.items() if progress >= share}
    for name, parameter in trainable_parameters(model) if stopped else ():
        if part_of(name) in stopped:
            parameter.grad = None
