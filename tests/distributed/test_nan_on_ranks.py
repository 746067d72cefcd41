"""One rank's NaN or explosion stops every rank, before the optimiser's step, and nobody waits for ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from checks import slow
from small_runs import WRONG, Run, finish, start

from sdft.formats.training_checkpoint import read_state


class Spoil(L.Callback):
    """From a step on, the loss of one rank is no number."""

    def __init__(self, step: int, rank: int):
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            batch.moments_BCHW[0] = float("nan")


@pytest.mark.parametrize("strategy", ["ddp", slow("fsdp")])
def test_a_nan_on_one_rank_stops_both(strategy: str, tmp_path: Path) -> None:
    run = Run(tmp_path, "full", strategy, save_every=2, callbacks=[Spoil(3, rank=1)])
    assert finish(start(run, 2)) == [WRONG, WRONG]
    report = json.loads((tmp_path / "bad_samples.json").read_text())
    (bad,) = (sample for sample in report["samples"] if sample["loss"] == "nan")
    assert (report["step"], bad["rank"], len(report["samples"])) == (3, 1, 4)
    for rank in (0, 1):
        text = (tmp_path / f"error_{rank}.txt").read_text()
        assert f"the loss became NaN or infinite at step 3 with {bad['key']}; {tmp_path / 'bad_samples.json'}" in text
    saved = read_state(run.last)
    assert saved["global_step"] == 2
    assert all(torch.isfinite(weight).all() for weight in saved["state_dict"].values())


class Heavy(L.Callback):
    """In a step, the samples of one rank weigh a million times as much."""

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, *_: Any) -> None:
        if trainer.global_step == 7 and trainer.global_rank == 1:
            batch.loss_weight_B *= 1e6


def test_a_gradient_that_runs_away_on_one_rank_stops_both(tmp_path: Path) -> None:
    run = Run(tmp_path, "full", "ddp", max_steps=9, save_every=2, callbacks=[Heavy()])
    assert finish(start(run, 2)) == [WRONG, WRONG]
    report = json.loads((tmp_path / "bad_samples.json").read_text())
    assert (report["step"], report["wrong"], len(report["samples"])) == (7, "gradient", 4)
    for rank in (0, 1):
        assert "the gradient diverged to" in (tmp_path / f"error_{rank}.txt").read_text()
    assert read_state(run.last)["global_step"] == 6
