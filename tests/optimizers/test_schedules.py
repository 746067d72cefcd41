"""Learning-rate schedules, by hand and against those of diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from diffusers.optimization import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup
from torch.optim.lr_scheduler import LambdaLR

from sdft.optimizers.schedules import by_part, constant, cosine, cosine_restarts, fall_to_come, warmup_stable_decay

NUM_STEPS, WARMUP = 50, 8


def factors(build: Callable[[torch.optim.Optimizer], LambdaLR]) -> list[float]:
    """The rate of each step, and of the one after the last, of an optimizer whose rate is 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, rates = build(optimizer), []
    for _ in range(NUM_STEPS + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_cosine_by_hand() -> None:
    rates = factors(partial(cosine, num_steps=NUM_STEPS, warmup_steps=10, final=0.2))
    assert rates[:10] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert rates[10] == 1.0
    assert rates[30] == pytest.approx(0.6)  # halfway between 1 and 0.2
    assert rates[40] == pytest.approx(0.2 + 0.8 * (1 - 2**-0.5) / 2)
    assert rates[50] == pytest.approx(0.2)


def test_without_a_warmup_they_are_diffusers_schedules_bit_for_bit() -> None:
    theirs = partial(get_cosine_schedule_with_warmup, num_warmup_steps=0, num_training_steps=NUM_STEPS)
    assert factors(partial(cosine, num_steps=NUM_STEPS)) == factors(theirs)
    assert factors(partial(constant, num_steps=NUM_STEPS)) == [1.0] * (NUM_STEPS + 1)


@pytest.mark.parametrize("name", ["cosine", "constant"])
def test_diffusers_warmup_is_one_step_late(name: str) -> None:
    """Theirs starts with a rate of 0; from the end of the warm-up the bits are the same."""
    ours = partial({"cosine": cosine, "constant": constant}[name], num_steps=NUM_STEPS, warmup_steps=WARMUP)
    theirs = {
        "cosine": partial(get_cosine_schedule_with_warmup, num_warmup_steps=WARMUP, num_training_steps=NUM_STEPS),
        "constant": partial(get_constant_schedule_with_warmup, num_warmup_steps=WARMUP),
    }[name]
    rates, others = factors(ours), factors(theirs)
    assert others[0] == 0 < rates[0]
    assert rates[: WARMUP - 1] == others[1:WARMUP]
    assert rates[WARMUP - 1] == rates[WARMUP] == others[WARMUP] == 1
    assert rates[WARMUP:] == others[WARMUP:]


def test_how_far_a_rate_will_still_fall() -> None:
    """Half of a cosine lies after its middle; the rate of the last step counts, and the largest one to come."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3.0)
    falling = cosine(optimizer, num_steps=101, final=0.2)
    last = 0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 100 / 101))
    assert fall_to_come(falling, 0, 101) == pytest.approx(1 - last)
    assert fall_to_come(falling, 75, 101) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 75 / 101)) - last)
    assert fall_to_come(falling, 100, 101) == fall_to_come(falling, 101, 101) == 0.0
    assert fall_to_come(constant(optimizer, num_steps=100, warmup_steps=10), 0, 100) == 0.0
    again = cosine_restarts(optimizer, num_steps=100, cycles=2)
    assert fall_to_come(again, 49, 100) == pytest.approx(1.0, abs=1e-2)  # the second cycle is still to come
    stable = warmup_stable_decay(optimizer, num_steps=100, decay=0.2)
    assert fall_to_come(stable, 79, 100) > 0.9
    assert fall_to_come(stable, 99, 100) == 0.0


def test_of_several_parts_the_one_counts_that_falls_most() -> None:
    groups = [{"params": [torch.zeros(1)], "name": name} for name in ("unet", "text_encoder")]
    schedule = by_part(torch.optim.SGD(groups, lr=1.0), constant, {"text_encoder": cosine}, num_steps=10)
    assert fall_to_come(schedule, 5, 10) == fall_to_come(cosine(torch.optim.SGD(groups, lr=1.0), 10), 5, 10) > 0
    unknown = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), 10)
    assert fall_to_come(unknown, 5, 10) == 0.0
