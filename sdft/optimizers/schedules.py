"""Learning-rate schedules, stepped once per optimizer step.

Those of diffusers (`get_scheduler`) are not used: their warm-up starts at a rate of 0, so that the first step trains
nothing, and their cosine has no final rate. After the warm-up the factors are the same bits (a test compares them).
torch's `CosineAnnealingLR` computes each rate from the one before, so that rounding adds up, and has no warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any

import torch
from annotated_types import Gt, Le
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LambdaLR, LRScheduler

from sdft.errors import UserError
from sdft.optimizers.optimizers import averages_weights, probe
from sdft.types import Count, Fraction, Index, Positive


def constant(optimizer: Optimizer, num_steps: int, warmup_steps: Index = 0) -> LambdaLR:
    """The full rate after a linear warm-up."""
    return LambdaLR(optimizer, lambda step: _warmup(step, warmup_steps))


def cosine(optimizer: Optimizer, num_steps: int, warmup_steps: Index = 0, final: Fraction = 0.0) -> LambdaLR:
    """Half a cosine from the full rate to `final` times it at the last step, after a linear warm-up."""
    return _decay(optimizer, num_steps, warmup_steps, final, lambda x: 0.5 * (1 + math.cos(math.pi * x)))


def linear(optimizer: Optimizer, num_steps: int, warmup_steps: Index = 0, final: Fraction = 0.0) -> LambdaLR:
    """A line from the full rate to `final` times it at the last step, after a linear warm-up."""
    return _decay(optimizer, num_steps, warmup_steps, final, lambda x: 1 - x)


def polynomial(
    optimizer: Optimizer, num_steps: int, warmup_steps: Index = 0, power: Positive = 2.0, final: Fraction = 0.0
) -> LambdaLR:
    """A power of the remaining share of the steps, from the full rate to `final` times it, after a linear warm-up."""
    return _decay(optimizer, num_steps, warmup_steps, final, lambda x: (1 - x) ** power)


def cosine_restarts(
    optimizer: Optimizer, num_steps: int, warmup_steps: Index = 0, cycles: Count = 3, final: Fraction = 0.0
) -> LambdaLR:
    """`cycles` equal half cosines, each from the full rate to `final` times it, after a linear warm-up (SGDR,
    arXiv:1608.03983)."""

    def shape(x: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * (1.0 if x == 1 else x * cycles % 1)))

    return _decay(optimizer, num_steps, warmup_steps, final, shape)


def rex(optimizer: Optimizer, num_steps: int, warmup_steps: Index = 0, final: Fraction = 0.0) -> LambdaLR:
    """REX (arXiv:2107.04197): slower than a line at first, steep at the end; after a linear warm-up."""
    return _decay(optimizer, num_steps, warmup_steps, final, lambda x: (1 - x) / (0.5 + 0.5 * (1 - x)))


def warmup_stable_decay(
    optimizer: Optimizer,
    num_steps: int,
    warmup_steps: Index = 0,
    decay: Annotated[float, Gt(0), Le(1)] = 0.2,
    final: Fraction = 0.0,
) -> LambdaLR:
    """The full rate after a linear warm-up, then a fall to `final` times it over the last share `decay` of the steps.

    The fall is 1 minus a square root, the best shape in arXiv:2405.18392.
    """
    begin = 1 - decay
    return _decay(
        optimizer, num_steps, warmup_steps, final, lambda x: 1 - math.sqrt(max(x - begin, 0.0) / decay) if x < 1 else 0
    )


def by_part(
    optimizer: Optimizer,
    schedule: Callable[..., LRScheduler],
    part_schedules: Mapping[str, Callable[..., LRScheduler]],
    num_steps: int,
) -> LRScheduler:
    """One schedule in which the parameter groups of some parts have their own.

    part_schedules: name of a part, such as `text_encoder` or `words` -> its schedule.
    Raises UserError for schedules other than those of this module.
    """
    if not part_schedules:
        return schedule(optimizer, num_steps=num_steps)
    parts = [part_of(group) for group in optimizer.param_groups]
    factors = {}
    for name, make in {"": schedule, **part_schedules}.items():
        one = make(torch.optim.SGD([torch.zeros(1)], lr=1.0), num_steps=num_steps)
        if not isinstance(one, LambdaLR):
            key = f"part_schedules.{name}" if name else "lr_schedule"
            raise UserError(f"{key}: {type(one).__name__} cannot be one of several; choose an option of lr_schedule=")
        (factors[name],) = one.lr_lambdas
    return LambdaLR(optimizer, [factors[part if part in part_schedules else ""] for part in parts])


def part_of(group: Mapping[str, Any]) -> str:
    """The part of the model that a parameter group belongs to."""
    return str(group["name"]).split(".")[0]


def refuse_unknown_parts(groups: Sequence[Mapping[str, Any]], part_schedules: Collection[str]) -> None:
    """Raise UserError for schedules of parts that are not trained."""
    parts = {part_of(group) for group in groups}
    if unknown := sorted(set(part_schedules) - parts):
        raise UserError(f"part_schedules names {', '.join(unknown)}; the trained parts are {', '.join(sorted(parts))}")


def is_constant(schedule: LRScheduler) -> bool:
    """Whether a schedule leaves the rate of a new optimizer as it is."""
    if not isinstance(schedule, LambdaLR):
        return isinstance(schedule, ConstantLR) and schedule.factor == 1
    return all(factor(step) == 1 for factor in schedule.lr_lambdas for step in (0, 1, 50, 99))


def fall_to_come(schedule: LRScheduler, step: int, num_steps: int) -> float:
    """By how much the learning rate will still fall, in shares of its largest value in the run; of several parameter
    groups, that of the one that falls most. 0 for schedules that cannot be asked beforehand.

    step: optimizer steps that are done, of `num_steps`.
    """
    if not isinstance(schedule, LambdaLR) or step >= num_steps:
        return 0.0
    factors = dict.fromkeys(schedule.lr_lambdas)  # most groups share theirs
    rates_GT = [[factor(t) for t in range(num_steps)] for factor in factors]
    return max((max(rates_T[step:]) - rates_T[-1]) / max(rates_T) for rates_T in rates_GT if max(rates_T) > 0)


def refuse_schedule(optimizer: Callable[..., Optimizer], lr_schedule: Callable[..., LRScheduler]) -> None:
    """Raise UserError where a schedule changes the rate of an optimizer that needs none."""
    small = probe(optimizer)
    if averages_weights(small) and not is_constant(lr_schedule(small, num_steps=100)):
        raise UserError(
            f"lr_schedule: {type(small).__name__} averages the weights in place of a schedule; set "
            "lr_schedule=constant lr_schedule.warmup_steps=0 (optimizer.warmup_steps is its own warm-up)"
        )


def _decay(
    optimizer: Optimizer, num_steps: int, warmup_steps: int, final: float, shape: Callable[[float], float]
) -> LambdaLR:
    """shape: factor between 1 and 0 of the share of the steps after the warm-up that are done."""

    def factor(step: int) -> float:
        progress = min(max(step - warmup_steps, 0) / max(num_steps - warmup_steps, 1), 1.0)
        return _warmup(step, warmup_steps) * (final + (1 - final) * shape(progress))

    return LambdaLR(optimizer, factor)


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
