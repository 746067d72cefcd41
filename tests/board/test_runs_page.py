"""One page over many runs, and the command that writes pages."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from run_folders import ALERT, finish, write_history, write_run

from sdft.board import __main__ as command
from sdft.board.history import read_history
from sdft.board.run_page import run_data
from sdft.config.command import compose
from sdft.distributed import run_lock


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Two finished jobs of a sweep and one that goes on, beside a folder that is no run."""
    for number, (rank, gain) in enumerate([(4, 0.5), (16, 0.9), (8, None)]):
        run = tmp_path / "sweep" / str(number)
        history = write_history(run, 400, 400 if gain else 200)
        write_run(run, ["a cat"], [100], rank=rank, caption=ALERT, name=f"job {number}")
        if gain:
            finish(run, history, 400, style_gain=gain)
    (tmp_path / "notes").mkdir()
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["board", *words])
    command.main()


def test_a_table_curves_and_pictures_of_all_runs(three: Path, open_page, monkeypatch, capsys) -> None:
    call(monkeypatch, str(three))
    assert capsys.readouterr().out == f"next: open {three / 'index.html'}, 3 runs\n"
    page = open_page(three / "index.html")
    heads = [text.split("\xa0")[0] for text in page.locator("#run-table thead th").all_inner_texts()]
    assert heads == ["run", "state", "steps", "rank", "style gain", "val/eps mse", "train seconds"]
    rows = page.locator("#run-table tbody tr")
    assert rows.nth(2).locator("td").all_inner_texts()[:3] == ["training", "200 of 400", "8"]
    page.get_by_role("button", name="rank").click()
    assert rows.locator("th").all_inner_texts() == ["sweep/1", "sweep/2", "sweep/0"]
    assert page.locator("#curve-list figure").count() == 3
    page.locator("#choices select").select_option("train/loss")
    assert page.locator("#curve-list h3").all_inner_texts() == ["rank 4", "rank 16", "rank 8"]
    assert page.locator("#picture-list img").count() == 2
    page.locator("#search").fill("finished rank 4")
    assert [page.locator(f"{name}:visible").count() for name in ("tbody tr", "#curve-list figure")] == [1, 1]
    assert page.locator("#count").inner_text() == "1 of 3 runs"
    assert rows.locator("a").first.evaluate("link => link.href") == (three / "sweep/1/index.html").as_uri()
    page.locator("#search").fill("")
    rows.locator("a").first.click()
    page.locator("#title", has_text="job 1").wait_for()


def test_it_fits_a_phone(three: Path, open_page, monkeypatch) -> None:
    call(monkeypatch, str(three))
    page = open_page(three / "index.html", viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_page_of_a_killed_run_is_written_again_and_says_so(tmp_path: Path, open_page, monkeypatch) -> None:
    began = time.time() - 1000
    write_history(tmp_path, 400, 200, began=began)
    lock = {"host": socket.gethostname(), "boot": run_lock._boot(), "pid": 2**22 + 7, "began": "1", "started": ""}
    (tmp_path / ".lock").write_text(json.dumps(lock))
    call(monkeypatch, str(tmp_path))
    record = read_history(tmp_path)
    assert (record.end, record.updated) == ("stopped", pytest.approx(began + 20))
    page = open_page(tmp_path / "index.html")
    assert page.locator("#state").inner_text() == "Stopped at step 200 of 400."
    assert "killed" in page.locator("#alarm").inner_text()


def test_a_run_that_lives_is_left_alone(tmp_path: Path, monkeypatch) -> None:
    write_history(tmp_path, 400, 200)
    lock = {"host": socket.gethostname(), "boot": run_lock._boot(), "pid": os.getppid(), "started": ""}
    (tmp_path / ".lock").write_text(json.dumps(lock | {"began": run_lock._began(os.getppid())}))
    call(monkeypatch, str(tmp_path))
    assert read_history(tmp_path).end is None


@pytest.mark.slow
def test_a_forecast_is_added_by_the_config_of_the_run(tmp_path: Path, monkeypatch) -> None:
    write_history(tmp_path, 400)
    (tmp_path / ".hydra").mkdir()
    cfg = compose("train", ["experiment=dreamy_style", f"run_dir={tmp_path}"])
    (tmp_path / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    call(monkeypatch, str(tmp_path), "forecast=true")
    found = run_data(tmp_path)["plan"]
    assert 0.5 < found["forecast"]["host_gib"] < 2
    assert found["forecast"]["train_seconds"] > 0
    assert (found["most_gib"], found["seconds"]) == (1.5, pytest.approx(40.0))


@pytest.mark.parametrize(
    ("words", "message"), [(["nowhere"], "there is no such folder"), (["."], "there is no run in it")]
)
def test_a_folder_without_runs_is_refused(words, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        call(monkeypatch, *words)
    assert message in capsys.readouterr().err
