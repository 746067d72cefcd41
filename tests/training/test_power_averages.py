"""Averages whose width is chosen after the run (Karras et al., arXiv:2312.02696)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_runs import KillAt, Run, finish, result, start

from sdft.errors import UserError
from sdft.formats.power_average import (
    KeptAverages,
    cumulative,
    decay,
    exponent,
    snapshot_steps,
    solve,
    width_of,
    write_averages,
)
from sdft.training.callbacks.power_averages import PowerAverages


def test_exponents_by_hand() -> None:
    """g = 0 is the mean of all steps, of width 1 / sqrt 12; the paper's table has 6.94 for 0.1 and 16.97 for 0.05."""
    assert exponent(12**-0.5) == pytest.approx(0, abs=1e-6)
    assert exponent(0.1) == pytest.approx(6.94, abs=0.005)
    assert exponent(0.05) == pytest.approx(16.97, abs=0.005)
    for width in (0.01, 0.03, 0.2):
        assert width_of(exponent(width)) == pytest.approx(width, rel=1e-9)
    # The profile t^6.94 on [0, 1] has this standard deviation.
    mass = np.diff(cumulative(exponent(0.1), 100_000, 100_000), prepend=0.0)
    at = np.arange(1, 100_001) / 100_000
    assert math.sqrt((mass * at**2).sum() - (mass * at).sum() ** 2) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("width", [0.0, -1.0, 0.3])
def test_a_width_that_no_average_has(width: float) -> None:
    with pytest.raises(UserError, match=r"at most 0\.289"):
        exponent(width)


def averages_of(theta: np.ndarray, width: float) -> np.ndarray:
    """The average after each step, by the recursion."""
    value, found = np.zeros_like(theta[0]), []
    for step, now in enumerate(theta, start=1):
        value = decay(exponent(width), step) * value + (1 - decay(exponent(width), step)) * now
        found.append(value)
    return np.stack(found)


def test_the_recursion_has_the_weights_of_the_closed_form() -> None:
    theta = np.random.default_rng(0).normal(size=(50, 3))
    mass = np.diff(cumulative(exponent(0.1), 50, 50), prepend=0.0)
    assert averages_of(theta, 0.1)[-1] == pytest.approx(mass @ theta, rel=1e-12)


@pytest.mark.parametrize("num_steps", [100, 240, 3000])
@pytest.mark.parametrize("width", [0.04, 0.05, 0.075, 0.12, 0.2])
def test_a_rebuilt_average_is_the_true_one_to_a_thousandth(num_steps: int, width: float, tmp_path: Path) -> None:
    """Of weights that walk and converge, 16 copies of two widths; 0.05 was kept itself."""
    rng = np.random.default_rng(1)
    theta = np.cumsum(rng.normal(size=(num_steps, 64)) / np.sqrt(np.arange(1, num_steps + 1))[:, None], 0)
    kept = {w: averages_of(theta, w) for w in (0.05, 0.1)}
    for step in snapshot_steps(16, num_steps):
        copies = {w: {"a": torch.tensor(values[step - 1]).float()} for w, values in kept.items()}
        write_averages(tmp_path / "averages" / f"step_{step:06d}.safetensors", copies)
    rebuilt, error = KeptAverages(tmp_path).rebuild(width)
    true = averages_of(theta, width)[-1]
    assert np.linalg.norm(rebuilt["a"].numpy() - true) < 1e-3 * np.linalg.norm(true)
    assert error < 0.03 if width != 0.05 else error < 1e-6


def test_weights_that_stand_still_are_rebuilt_exactly() -> None:
    """The factors add up to 1, whatever the profile."""
    kept = [(w, t) for t in (10, 20) for w in (0.05, 0.1)]
    assert solve(kept, 0.25, 20).factors.sum() == pytest.approx(1, abs=1e-9)
    assert solve(kept, 0.25, 20).error > 0.05


def test_steps_of_copies() -> None:
    assert snapshot_steps(4, 100) == {25, 50, 75, 100}
    assert snapshot_steps(16, 5) == {1, 2, 3, 4, 5}


def test_a_folder_without_averages(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train with callbacks=power_averages"):
        KeptAverages(tmp_path).rebuild(0.1)
    file = tmp_path / "averages" / "step_000010.safetensors"
    write_averages(file, {0.05: {"a": torch.ones(2)}, 0.1: {"a": torch.ones(2)}})
    with pytest.raises(UserError, match=r"no averages of step 7; there are \[10\]"):
        KeptAverages(tmp_path).rebuild(0.1, step=7)
    file.write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="is not a copy of averages"):
        KeptAverages(tmp_path).rebuild(0.1)


def kept_of(run: Run) -> dict[str, torch.Tensor]:
    """All copies of a run, by file and name."""
    files = KeptAverages(run.folder).steps
    assert list(files) == [2, 4, 6]
    return {f"{step}/{name}": value for step, file in files.items() for name, value in load_file(file).items()}


def test_copies_of_a_resumed_run_are_those_of_a_whole_one(tmp_path: Path) -> None:
    """Killed after a copy that the checkpoint does not know: it is written again."""

    def averages(folder: str) -> PowerAverages:
        return PowerAverages(str(tmp_path / folder), count=3)

    whole = Run(tmp_path / "whole", callbacks=[averages("whole")])
    result(whole)
    saved = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    killed = Run(tmp_path / "killed", callbacks=[averages("killed"), KillAt(5, saved=saved)])
    assert finish(start(killed)) == [-9]
    result(replace(killed, callbacks=[averages("killed")], resume=killed.last))
    expected, resumed = kept_of(whole), kept_of(killed)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def test_shards_are_averaged_like_whole_weights(tmp_path: Path) -> None:
    options = {"caption_dropout": 0.2, "lr": 1e-3}
    runs = {}
    for name, batch_size, strategy, world_size in (("whole", 4, "one", 1), ("shards", 2, "fsdp", 2)):
        callbacks = [PowerAverages(str(tmp_path / name), count=3)]
        run = Run(tmp_path / name, batch_size=batch_size, strategy=strategy, callbacks=callbacks, **options)
        result(run, world_size)
        runs[name] = kept_of(run)
    assert runs["whole"].keys() == runs["shards"].keys()
    for name, value in runs["whole"].items():
        torch.testing.assert_close(runs["shards"][name], value, rtol=2e-3, atol=2e-5, msg=name)
