"""The page of a run is written while it goes on, by a callback that changes no bit of it and ends no run."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import assert_equal
from small_runs import KillAt, Run, assert_same_end, finish, result, start

from sdft.board.history import Record, read_history
from sdft.board.run_page import run_data
from sdft.errors import UserError
from sdft.formats.training_checkpoint import read_state
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.optimizers.optimizers import adamw
from sdft.optimizers.schedules import constant
from sdft.training.callbacks import page as module
from sdft.training.callbacks.guard import Guard
from sdft.training.callbacks.measured import Measured, rates
from sdft.training.callbacks.page import RunPage, followed
from sdft.training.trainer import trainer
from sdft.tuning.adapter import Adapter


def fit(folder: Path, tiny_model, tiny_source, page: RunPage | None, end: BaseException | None = None, **settings: Any):
    """A run of seven steps with two validations; `end` is raised behind it."""
    from sdft.data.datamodule import Images

    options = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "progress_bar": False, "log_every": 2}
    callbacks = [Guard(str(folder)), *([page] if page else [])]
    run = trainer(max_steps=7, validate_every=3, callbacks=callbacks, run_dir=str(folder), **options | settings)
    tuning, rate = Adapter(rank=2), partial(adamw, lr=1e-3)
    finetuning = Finetuning(tiny_model(), tuning, Denoising(), rate, constant, seed=0)
    data = Images(tiny_source(6), tiny_source(2, "held out"), batch_size=2, size=32, seed=3)
    with followed(run, ["  a line"], lambda: {"host_gib": 1.0}, lambda text: text.replace("secret", "***")):
        run.fit(finetuning, data)
        if end is not None:
            raise end
    return finetuning


def test_what_was_logged_is_kept_without_any_logger(tiny_model, tiny_source, tmp_path: Path) -> None:
    fit(tmp_path, tiny_model, tiny_source, RunPage(str(tmp_path)))
    record = read_history(tmp_path)
    names = {f"timestep/{200 * i}" for i in range(5)} | {
        "train/loss", "train/eps_mse", "train/gradient_norm", "val/loss", "val/eps_mse", "rate/unet", "speed/seconds",
        "memory/now", "memory/most",
    }  # fmt: skip
    assert set(record.curves) - names == set()
    assert names - set(record.curves) <= {f"timestep/{200 * i}" for i in range(5)}
    assert list(record.curves["train/loss"]) == [2, 4, 6]
    assert list(record.curves["val/eps_mse"]) == [3, 6]
    assert record.curves["rate/unet"] == {2: 0.001, 4: 0.001, 6: 0.001}
    assert (record.end, record.step, record.start["lines"]) == ("finished", 7, ["  a line"])
    assert len(run_data(tmp_path)["training_pictures"]) == 6
    assert (tmp_path / "index.html").is_file()


def test_the_losses_of_all_batches_are_in_the_bins_of_their_timesteps() -> None:
    measured, step = Measured(), torch.tensor
    for number, (losses, times) in enumerate([([1.0, 3.0], [0.0, 0.19]), ([5.0, 7.0], [0.2, 0.999])]):
        latest = Record()
        latest.loss_B, latest.time_B = step(losses), step(times)
        measured.batch(latest, number + 1)
    assert list(measured.losses_by_timestep(2)) == [(2, {"timestep/0": 2.0, "timestep/200": 5.0, "timestep/800": 7.0})]
    assert list(measured.losses_by_timestep(3)) == []


def test_the_rate_of_a_part_is_that_of_its_first_group_times_what_the_optimizer_estimates() -> None:
    groups = [{"name": "unet", "lr": 1.0, "d": 1e-4}, {"name": "unet", "lr": 9.0}, {"name": "words", "lr": 0.5}]
    assert rates(groups) == {"unet": 1e-4, "words": 0.5}


def test_no_bit_changes(tiny_model, tiny_source, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "FIRST", 0.0)
    page = RunPage(str(tmp_path), every=1e-6, share=1.0)
    with_page, without = (fit(tmp_path, tiny_model, tiny_source, one) for one in (page, None))
    assert_equal(with_page.state_dict(), without.state_dict(), "weights")


@pytest.mark.slow
def test_a_killed_and_resumed_run_has_one_curve(tmp_path: Path) -> None:
    """The same bits as a run without a page, and each step once."""
    folder = tmp_path / "killed"
    options = {"max_steps": 6, "save_every": 2, "validate_every": 3}
    straight = Run(tmp_path / "straight", **options)
    expected = result(straight)
    killed = Run(folder, **options, callbacks=[RunPage(str(folder)), KillAt(5, "on_train_batch_end")])
    assert finish(start(killed)) == [-9]
    assert read_state(killed.last)["global_step"] == 4
    before = read_history(folder)
    assert (list(before.curves["val/eps_mse"]), before.end) == ([3], None)
    again = Run(folder, **options, callbacks=[RunPage(str(folder))], resume=killed.last)
    assert_same_end(straight, again, expected, result(again))
    record = read_history(folder)
    assert (record.num_starts, record.start["step"], record.step) == (2, 4, 6)
    assert list(record.curves["val/eps_mse"]) == [3, 6]


@pytest.mark.parametrize(
    ("end", "how", "reason"),
    [
        (UserError("a secret"), "failed", "a ***"),
        (SystemExit(143), "stopped", ""),
        (ValueError(), "failed", "ValueError"),
    ],
)
def test_the_page_says_how_a_run_ended(end, how, reason, tiny_model, tiny_source, tmp_path: Path) -> None:
    with pytest.raises(type(end)):
        fit(tmp_path, tiny_model, tiny_source, RunPage(str(tmp_path)), end)
    state = run_data(tmp_path)["state"]
    assert (state["what"], state["reason"], state["step"]) == (how, reason, 7)


def test_an_error_of_the_page_is_a_warning_once(tiny_model, tiny_source, tmp_path: Path, monkeypatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(module, "FIRST", 0.0)
    monkeypatch.setattr(module, "write_run_page", full)
    with pytest.warns(UserWarning, match="the page of the run cannot be written") as caught:
        fit(tmp_path, tiny_model, tiny_source, RunPage(str(tmp_path), every=1e-6))
    assert sum("page of the run" in str(one.message) for one in caught) == 1
    assert read_history(tmp_path).end == "finished"


def test_a_short_run_writes_its_page_once_and_fast(tiny_model, tiny_source, tmp_path: Path, monkeypatch) -> None:
    seconds = []

    def timed(*args: Any, **options: Any) -> None:
        begun = time.thread_time()
        write(*args, **options)
        seconds.append(time.thread_time() - begun)

    write = module.write_run_page
    monkeypatch.setattr(module, "write_run_page", timed)
    fit(tmp_path, tiny_model, tiny_source, RunPage(str(tmp_path)))
    assert len(seconds) == 1
    assert seconds[0] < 0.1


def test_writing_takes_its_share_of_the_time_and_a_long_run_gets_a_forecast(
    tiny_model, tiny_source, tmp_path: Path, monkeypatch
) -> None:
    """Where writing takes as long as a step, a share of a quarter leaves out most of the steps."""
    written = []

    def slowly(*_: Any, **__: Any) -> None:
        time.sleep(0.3)
        written.append(1)

    monkeypatch.setattr(module, "FIRST", 0.0)
    monkeypatch.setattr(module, "LONG", 0.0)
    monkeypatch.setattr(module, "write_run_page", slowly)
    begun = time.monotonic()
    fit(tmp_path, tiny_model, tiny_source, RunPage(str(tmp_path), every=1e-6, share=0.25))
    most = 2 + 0.25 * (time.monotonic() - begun) / 0.3
    assert 2 <= len(written) <= most
    assert run_data(tmp_path)["plan"]["forecast"]["host_gib"] == 1.0


def test_the_end_of_a_run_does_not_wait_for_a_forecast(tiny_model, tiny_source, tmp_path: Path, monkeypatch) -> None:
    """Of a run that is stopped before its page is due: SLURM and spot machines leave it seconds."""
    monkeypatch.setattr(module, "LONG", 0.0)
    with pytest.raises(SystemExit):
        fit(tmp_path, tiny_model, tiny_source, RunPage(str(tmp_path)), end=SystemExit(143))
    assert (tmp_path / "index.html").is_file()
    assert run_data(tmp_path)["plan"]["forecast"]["host_gib"] is None
