"""Watching a run by its pictures: the weights stay the same, and a resumed run goes on."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checks import slow
from small_runs import KillAt, Run, finish, result, start
from tiny import SIZE, TinySource

from sdft.errors import UserError
from sdft.evaluation.stopping import Measurement, StoppingRule
from sdft.evaluation.watching import Watched
from sdft.sampling.samplers import Sampler
from sdft.training.callbacks.watch import Watch, read_measurements, spread


class Red(TinySource):
    """Images of a style that noise has not."""

    def __init__(self) -> None:
        super().__init__(8, "red", (SIZE, SIZE))
        self.images[..., 1:] //= 8


def watch(folder: Path, **options: Any) -> Watch:
    measures = Watched(Red(), [], Sampler(steps=2, batch_size=2), SIZE, num_images=4, num_others=0, num_training=2)
    return Watch(str(folder), measures, **options)


class After(StoppingRule):
    """Stops at the second measurement."""

    def __call__(self, history: Sequence[Measurement]) -> str | None:
        return "enough" if len(history) > 2 else None


@pytest.mark.slow
def test_weights_are_the_same_and_a_resumed_run_measures_the_same(tmp_path: Path) -> None:
    bare = result(Run(tmp_path / "bare"))
    whole = Run(tmp_path / "whole", callbacks=[watch(tmp_path / "whole", every=2)])
    watched = result(whole)
    assert all(torch.equal(value, watched["weights"][name]) for name, value in bare["weights"].items())
    found = read_measurements(whole.folder / "watch" / "measurements.jsonl")
    assert [one.step for one in found] == [0, 2, 4, 6]
    assert {*found[-1].values} == {"style_gain", "novelty"}
    assert np.ptp([one.means["style_gain"] for one in found]) > 0
    base, *to_fall = [one.rate_to_fall for one in found]
    assert base == 0.0
    assert 0.5 < to_fall[0] < 0.9
    assert to_fall[0] > to_fall[1] > to_fall[2] == 0.0
    assert len(list((whole.folder / "watch").glob("step_*.png"))) == 3

    saved = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    killed = Run(tmp_path / "killed", callbacks=[watch(tmp_path / "killed", every=2), KillAt(5, saved=saved)])
    assert finish(start(killed)) == [-9]
    result(replace(killed, callbacks=[watch(tmp_path / "killed", every=2)], resume=killed.last))
    lines = [(run.folder / "watch" / "measurements.jsonl").read_text() for run in (whole, killed)]
    assert lines[0] == lines[1]
    assert json.loads(lines[0].splitlines()[1])["step"] == 2


@pytest.mark.parametrize(("strategy", "world_size"), [("one", 1), slow("ddp", 2), slow("fsdp", 2)])
def test_a_run_is_stopped_with_everything_saved(strategy: Any, world_size: int, tmp_path: Path) -> None:
    options = {"stop": After(), "keep": True}
    callbacks = [watch(tmp_path, every=0.34, **options)]  # of 6 steps: 2
    run = Run(tmp_path, callbacks=callbacks, strategy=strategy)
    assert result(run, world_size)["step"] == 4
    assert run.last.is_file()
    assert {path.name for path in run.last.parent.glob("step_*.ckpt")} == {"step_000002.ckpt", "step_000004.ckpt"}


@pytest.mark.slow
def test_a_budget_that_allows_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, max_steps=14, callbacks=[watch(tmp_path, budget=1e-6)])
    result(run)
    assert not (tmp_path / "watch").exists()


def test_a_measurement_that_is_left_out_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The steps were slow when the measurements were planned, and are fast now: five seconds of a run of one."""
    callback: Any = watch(tmp_path)
    callback._planned, callback._cost, callback._begun = {14}, 5.0, time.monotonic() - 1
    callback._watch(SimpleNamespace(is_global_zero=True, max_steps=14, global_step=14), None, 14)
    assert "callbacks.watch: step 14 is not measured, which would take more than budget=0.05" in capsys.readouterr().out
    assert not callback.history


def test_measurements_are_spread_over_the_rest_of_the_run() -> None:
    assert spread(3, 10, 100) == {40, 70, 100}
    assert spread(1, 10, 100) == {100}
    assert spread(1000, 10, 14) == {11, 12, 13, 14}
    assert spread(0, 10, 100) == set()


def test_stopping_needs_steps_that_do_not_depend_on_the_machine(tmp_path: Path) -> None:
    for options in ({"stop": StoppingRule()}, {"keep": True}):
        with pytest.raises(UserError, match=rf"callbacks\.watch\.{next(iter(options))}: needs callbacks\.watch\.every"):
            watch(tmp_path, **options)


def test_the_summary_says_why_a_run_stopped(tmp_path: Path) -> None:
    callback = watch(tmp_path, every=2)
    assert callback.summary() == {"watch_seconds": 0.0}
    callback.history.append(Measurement.of(2, {"adherence": np.array([0.5, 0.7])}))
    callback.stopped = "enough"
    assert callback.summary() == {"watch/adherence": 0.6, "watch_seconds": 0.0, "stopped_because": "enough"}
