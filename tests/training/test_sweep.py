"""Sweeps: the table at their end, and that an interrupted one continues without repeating a job."""

from __future__ import annotations

import importlib.machinery
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

import train
from sdft.config.command import CONF_DIR, compose
from sdft.errors import UserError
from sdft.training import receipt
from sdft.training.sweep import finished, print_table, this_command

SMALL = [
    "logger=csv",
    "verdict=none",
    "callbacks=checkpoints",
    "trainer.max_steps=1",
    "trainer.validate_every=1",
    "trainer.progress_bar=False",
    "data.batch_size=2",
    "data.train.num_scenes=4",
    "data.validation.num_scenes=2",
    "metric=val/eps_mse",
]
"""A run of a few seconds."""
OPTIONS = {"mine": "optimizer/adamw.yaml", "listed": "objective/weighting/min_snr.yaml"}
"""Copied under another name into a folder outside."""


def job(folder: Path, words: list[str], summary: dict | None, metric: str = "style_gain", error: str = "") -> None:
    """What a job of a sweep leaves."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(words))
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump({"metric": metric}))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / receipt.NAME).write_text(json.dumps({"overrides": words, "outputs": {}}))
    if error:
        (folder / "error.txt").write_text(f"{error}\n")


def test_the_table_ranks_the_jobs_and_shows_what_was_varied(tmp_path: Path, capsys) -> None:
    figures = {"style_gain": 0.71234, "adherence": 0.9, "train_seconds": 61.4}
    job(tmp_path / "0", ["name=a", "rank=4", "optimizer.lr=1e-3"], figures)
    job(tmp_path / "1", ["name=a", "rank=16", "optimizer.lr=1e-3"], None, error="no room on the disk")
    job(tmp_path / "2", ["name=a", "rank=8", "optimizer.lr=3e-3"], {**figures, "style_gain": 0.9})
    (tmp_path / ".submitit").mkdir()
    print_table(tmp_path)
    lines = (tmp_path / "table.txt").read_text().splitlines()
    assert [line.split() for line in lines] == [
        ["rank", "optimizer.lr", "style", "gain", "adherence", "seconds", "folder"],
        ["8", "3e-3", "0.900", "0.900", "61", "2"],
        ["4", "1e-3", "0.712", "0.900", "61", "0"],
        ["16", "1e-3", "-", "-", "-", "1"],
        ["1", "failed:", "no", "room", "on", "the", "disk"],
    ]
    assert (tmp_path / "table.txt").read_text() in capsys.readouterr().out


def test_the_metric_of_the_sweep_is_a_column(tmp_path: Path) -> None:
    job(tmp_path / "0", ["rank=4"], {"val/eps_mse": 0.125}, metric="val/eps_mse")
    job(tmp_path / "1", ["rank=8"], {"val/eps_mse": 0.25}, metric="val/eps_mse")
    print_table(tmp_path)
    first, second, third = (tmp_path / "table.txt").read_text().splitlines()
    assert "val/eps_mse" in first
    assert "0.125" in second
    assert "0.250" in third


def test_a_finished_job_of_another_grid_is_not_overwritten(tmp_path: Path) -> None:
    job(tmp_path / "3", ["rank=4", "resume=auto"], {"style_gain": 0.5})
    assert finished(tmp_path / "3", ["rank=4"]) == {"style_gain": 0.5}
    assert finished(tmp_path / "4", ["rank=4"]) is None
    with pytest.raises(UserError, match=r"finished job of another sweep \(rank=4\)"):
        finished(tmp_path / "3", ["rank=8"])


def sweep(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *SMALL, *words])
    train.main()


@pytest.mark.slow
def test_an_interrupted_search_continues(tmp_path: Path, monkeypatch, capsys) -> None:
    """The second command asks for the same three jobs, and runs the one that has no result."""
    pytest.importorskip("optuna", reason="the extra `sweep` is not installed")
    search = ["hydra/sweeper=search", "hydra.sweeper.n_trials=3", "hydra.sweeper.direction=minimize", "rank=2,4"]
    monkeypatch.chdir(tmp_path)
    sweep(monkeypatch, *search, "hydra.sweep.dir=swept")
    jobs = [tmp_path / "swept" / str(number) for number in range(3)]
    first = [json.loads((job / receipt.NAME).read_text()) for job in jobs]
    assert len({r["config"]["optimizer"]["lr"] for r in first}) == 3, "the search tried one rate"
    (jobs[2] / "summary.json").unlink()
    kept = [(job / "lora.safetensors").stat().st_mtime_ns for job in jobs]
    capsys.readouterr()
    sweep(monkeypatch, *search, "hydra.sweep.dir=swept")
    printed = capsys.readouterr().out
    assert printed.count("is finished") == 2
    now = [(job / "lora.safetensors").stat().st_mtime_ns for job in jobs]
    assert (now[0], now[1]) == (kept[0], kept[1])
    assert now[2] > kept[2]
    again = json.loads((jobs[2] / receipt.NAME).read_text())
    assert (again["overrides"], again["outputs"]) == (first[2]["overrides"], first[2]["outputs"])
    table = (tmp_path / "swept" / "table.txt").read_text().splitlines()
    assert len(table) == 4
    assert "val/eps_mse" in table[0]


def test_one_job_of_a_grid_runs_by_its_number(tmp_path: Path, monkeypatch) -> None:
    """What a task of a SLURM array does: the same folder, words and table as the whole sweep would make."""
    monkeypatch.chdir(tmp_path)
    grid = ["rank=2,4", "tuning.alpha=1,2", "hydra.sweep.dir=swept"]
    sweep(monkeypatch, *grid, "hydra.job.num=2")
    assert sorted(path.name for path in (tmp_path / "swept").iterdir()) == ["2", "table.txt"]
    record = json.loads((tmp_path / "swept" / "2" / receipt.NAME).read_text())
    assert record["overrides"] == [*SMALL, "rank=4", "tuning.alpha=1"]
    assert yaml.safe_load((tmp_path / "swept" / "2" / ".hydra" / "overrides.yaml").read_text()) == record["overrides"]
    with pytest.raises(SystemExit):
        sweep(monkeypatch, *grid, "hydra.job.num=4")


def test_a_program_is_started_again_as_it_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package's `__main__` as a module: as a file, its folder would hide the package."""
    program = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", program)
    monkeypatch.setattr(sys, "argv", ["/env/bin/sdft-train", "-m"])
    program.__spec__ = None
    assert this_command() == [sys.executable, "/env/bin/sdft-train"]
    program.__spec__ = importlib.machinery.ModuleSpec("sdft.training.__main__", None)
    assert this_command() == [sys.executable, "-m", "sdft.training.__main__"]


def test_a_job_of_several_processes_finds_the_folders_of_the_sweep(tmp_path: Path, monkeypatch) -> None:
    """The separate command of each job has the sweep's --config-dir and hydra.searchpath, and composes its config."""
    places = {"mine": "optimizer/mine", "listed": "objective/weighting/listed"}
    for place, option in places.items():
        (tmp_path / place / option).parent.mkdir(parents=True)
        (tmp_path / place / f"{option}.yaml").write_text((CONF_DIR / OPTIONS[place]).read_text())
    mine, listed = f"--config-dir={tmp_path / 'mine'}", f"hydra.searchpath=[file://{tmp_path / 'listed'}]"
    chosen = ["optimizer=mine", "objective/weighting=listed"]
    started: list[list[str]] = []

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess:
        started.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("sdft.training.__main__.num_devices", lambda trainer: 2)
    with pytest.raises(SystemExit):
        sweep(monkeypatch, "--config-dir", str(tmp_path / "mine"), listed, *chosen, "rank=2,4", "hydra.sweep.dir=swept")
    assert len(started) == 2
    for number, rank in enumerate(("rank=2", "rank=4")):
        words = started[number][len(this_command()) :]
        assert {"--config-name=train", mine, listed, rank, f"hydra.job.num={number}", *chosen} <= set(words)
        assert f"hydra.run.dir='{tmp_path / 'swept' / str(number)}'" in words
        assert not [word for word in words if word in ("-m", "--multirun") or word.startswith("hydra.mode=")]
        cfg = compose("train", [w for w in words if not w.startswith("--")], config_dirs=[tmp_path / "mine"])
        assert cfg.rank == number * 2 + 2


def test_jobs_are_ranked_by_the_metric_of_the_sweep(tmp_path: Path) -> None:
    """A loss: the lowest first, whatever the style gain, and a job without it last."""
    for number, loss in enumerate([0.3, 0.1, None]):
        summary = {"style_gain": 0.5, "val/eps_mse": loss, "train_seconds": 1.0}
        job(tmp_path / str(number), [f"rank={number}"], summary, metric="val/eps_mse")
    print_table(tmp_path)
    assert [line.split()[-1] for line in (tmp_path / "table.txt").read_text().splitlines()] == ["folder", "1", "0", "2"]


def test_a_sweep_without_its_metric_is_ranked_by_the_validation_loss(tmp_path: Path) -> None:
    """Three held-out images give no style gain: the table has the metric that ranks instead, and the reason."""
    for number, loss in enumerate([0.3, 0.1, 0.2]):
        summary = {"style_gain": None, "style_gain_note": "not measured: 3 held-out images, needs 4"}
        job(tmp_path / str(number), [f"rank={number}"], summary | {"val/eps_mse": loss, "train_seconds": 1.0})
    print_table(tmp_path)
    header, *rows, note = (tmp_path / "table.txt").read_text().splitlines()
    assert "val/eps_mse" in header
    assert [row.split()[-1] for row in rows] == ["1", "2", "0"]
    assert note == "ranked by val/eps_mse, as no job has style_gain (not measured: 3 held-out images, needs 4)"


def test_a_search_for_what_cannot_be_measured_ends_before_training(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("optuna", reason="the extra `sweep` is not installed")
    monkeypatch.chdir(tmp_path)
    words = [word for word in SMALL if not word.startswith(("verdict", "metric"))]
    monkeypatch.setattr(
        sys, "argv", ["train.py", "-m", *words, "hydra/sweeper=search", "hydra.sweeper.n_trials=1", "rank=2,4",
                      "reference.num_scenes=3", "hydra.sweep.dir=swept"],
    )  # fmt: skip
    with pytest.raises(SystemExit):
        train.main()
    assert "metric=style_gain: a search has nothing to go by: 3 held-out images" in capsys.readouterr().err
    assert not list((tmp_path / "swept").rglob("*.ckpt"))
