"""`best.ckpt` is the checkpoint that the measured pictures recommend."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sdft.board.curves import WATCHED
from sdft.evaluation.stopping import Limits, Measurement
from sdft.training.callbacks.best_by_pictures import BestByPictures
from sdft.training.callbacks.watch import write_measurements

NOISE = np.linspace(-0.02, 0.02, 8)


def run_of(folder: Path, gains: list[float], forgetting: list[float]) -> Path:
    """A run of as many measurements, two steps apart, whose last checkpoint is last.ckpt."""
    figures = zip([0.0, *gains], [0.0, *forgetting], strict=True)
    history = [
        Measurement.of(2 * n, {"style_gain": gain + NOISE, "forgetting": lost + NOISE[::-1]})
        for n, (gain, lost) in enumerate(figures)
    ]
    (folder / "watch").mkdir()
    write_measurements(folder / WATCHED, history)
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir()
    for one in history[1:-1]:
        (checkpoints / f"step_{one.step:06d}.ckpt").write_text(str(one.step))
    (checkpoints / "last.ckpt").write_text("last")
    return checkpoints / "best.ckpt"


def end(folder: Path, max_steps: int) -> None:
    trainer: Any = SimpleNamespace(is_global_zero=True, max_steps=max_steps, strategy=None)
    BestByPictures(str(folder), Limits(forgetting=0.3)).on_train_end(trainer, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gains", "forgetting", "best"),
    [
        ([0.3, 0.6, 0.8], [0.0, 0.1, 0.1], "last"),
        ([0.3, 0.6, 0.8], [0.0, 0.1, 0.9], "4"),
        ([0.3, 0.6, 0.4], [0.0, 0.1, 0.1], "4"),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], None),
    ],
    ids=["the last", "the last has forgotten", "the last has unlearned", "none is better than the base"],
)
def test_the_recommended_one_is_linked(
    gains: list[float], forgetting: list[float], best: str | None, tmp_path: Path
) -> None:
    path = run_of(tmp_path, gains, forgetting)
    end(tmp_path, max_steps=6)
    assert (path.read_text() if path.exists() else None) == best


def test_a_run_that_was_stopped_or_not_measured(tmp_path: Path) -> None:
    end(tmp_path, max_steps=6)
    assert not list(tmp_path.iterdir())
    path = run_of(tmp_path, [0.3, 0.6], [0.0, 0.1])
    (path.with_name("step_000004.ckpt")).write_text("4")
    end(tmp_path, max_steps=100)
    assert path.samefile(path.with_name("step_000004.ckpt"))
