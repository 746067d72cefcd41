"""history.jsonl: what a run logged, also over kills and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdft.board import history as module
from sdft.board.curves import MOST_POINTS, read_metrics_csv, reduced
from sdft.board.history import NAME, History, read_history
from sdft.board.state import PATIENCE, state_of


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch):
    """Sets the time at which lines are written."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    return now


def train(history: History, clock: list[float], steps: range, seconds: float = 2.0, shift: float = 0.0) -> None:
    for step in steps:
        clock[0] += seconds
        history.values(step, {"train/loss": step + shift})


def test_a_resumed_run_supersedes_the_steps_that_it_repeats(tmp_path: Path, clock) -> None:
    history = History(tmp_path)
    history.start(0, 10)
    train(history, clock, range(1, 8))
    history.values(6, {"val/loss": 1.0})
    history.start(5, 10)
    train(history, clock, range(6, 11), shift=0.5)
    record = read_history(tmp_path)
    losses = [1, 2, 3, 4, 5, 6.5, 7.5, 8.5, 9.5, 10.5]
    assert record.curves == {"train/loss": dict(zip(range(1, 11), losses, strict=True))}
    assert (record.num_starts, record.first_started, record.step) == (2, 1000.0, 10)


def test_another_run_in_the_same_folder_begins_anew(tmp_path: Path, clock) -> None:
    history = History(tmp_path)
    history.start(0, 4)
    train(history, clock, range(1, 5))
    history.end("finished")
    clock[0] = 5000.0
    history.start(0, 4)
    record = read_history(tmp_path)
    assert (record.curves, record.end, record.first_started, record.step) == ({}, None, 5000.0, 0)


def test_lines_that_cannot_be_read_are_left_out(tmp_path: Path, clock) -> None:
    history = History(tmp_path)
    history.start(0, 4)
    history.values(1, {"loss": 1.0, "broken": float("nan")})
    with (tmp_path / NAME).open("a") as file:
        file.write('[1]\n{"time": 1, "step": 2, "values": {"loss": "x"}}\n{"time": 1, "step": 2, "val')
    assert read_history(tmp_path).curves == {"loss": {1: 1.0}}


def test_the_state_says_how_far_and_how_long(tmp_path: Path, clock) -> None:
    history = History(tmp_path)
    history.start(0, 100)
    train(history, clock, range(10, 41, 10), seconds=20.0)
    state = state_of(read_history(tmp_path), None)
    assert (state["what"], state["step"], state["of"]) == ("training", 40, 100)
    assert state["left"] == pytest.approx(120.0)
    assert state["patience"] == PATIENCE
    clock[0] += 100.0  # a validation
    history.values(50, {"train/loss": 1.0})
    assert state_of(read_history(tmp_path), None)["patience"] == 300.0
    history.trained(100)
    assert state_of(read_history(tmp_path), None)["what"] == "finishing"
    history.end("failed", "why")
    state = state_of(read_history(tmp_path), None)
    assert (state["what"], state["reason"], state["left"], state["patience"]) == ("failed", "why", None, None)


def test_a_folder_of_an_earlier_version_has_the_state_of_its_summary(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss,val/loss\n0,9,0.5,\n0,9,,0.25\n0,19,nan,\n")
    assert read_metrics_csv(tmp_path) == {"train/loss": {10: 0.5}, "val/loss": {10: 0.25}}
    state = state_of(read_history(tmp_path), {"num_steps": 20})
    assert (state["what"], state["step"], state["of"]) == ("finished", 20, 20)
    assert state_of(read_history(tmp_path), None)["what"] == "unknown"


def test_a_long_curve_keeps_its_means_and_extremes() -> None:
    values = [json.loads(f"{(i * 7919) % 1000 / 1000}") for i in range(2001)]
    curve = reduced(dict(zip(range(10, 20011, 10), values, strict=True)))
    assert len(curve["x"]) <= MOST_POINTS
    assert (curve["x"][-1], max(curve["high"]), min(curve["low"])) == (20010, max(values), min(values))
    assert curve["y"][0] == pytest.approx(sum(values[:6]) / 6, rel=1e-4)
    assert reduced({1: 2.0, 2: 3.0}) == {"x": [1, 2], "y": [2.0, 3.0]}
