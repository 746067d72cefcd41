"""Nothing silent: a loss that is no number stops the run before a weight has changed, and names its samples."""

from __future__ import annotations

import pytest
import torch

from sdft.module import refuse_nonfinite
from sdft.types import Batch, LossReport, UserError


def batch_of(*keys: str) -> Batch:
    count = len(keys)
    return Batch(
        keys=keys,
        visits=[0] * count,
        captions=[""] * count,
        dropped_B=torch.zeros(count, dtype=torch.bool),
        time_ids_B6=torch.zeros(count, 6),
        loss_weight_B=torch.ones(count),
    )


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_the_samples_of_a_broken_loss_are_named(wrong: float) -> None:
    report = LossReport(torch.tensor([0.1, wrong, 0.2]))
    with pytest.raises(UserError, match=r"step 7 for bad\.png;") as stopped:
        refuse_nonfinite(report, batch_of("good.png", "bad.png", "fine.png"), step=7)
    assert "good.png" not in str(stopped.value)


def test_a_sound_loss_passes() -> None:
    refuse_nonfinite(LossReport(torch.tensor([0.0, 3.0])), batch_of("a", "b"), step=0)
