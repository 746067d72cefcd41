"""`~` in the options that name what is written: a shell expands it only at the beginning of a word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checks import slow

from sdft.config.command import with_home

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run_dir=~/a", "run_dir=/home/me/a"),
        ("+run_dir=~", "+run_dir=/home/me"),
        ("out='~/a b'", "out='/home/me/a b'"),
        ('hydra.sweep.dir="~/a"', 'hydra.sweep.dir="/home/me/a"'),
        ("out=a~b", "out=a~b"),
        ("name=~/a", "name=~/a"),
        ("~callbacks.ema", "~callbacks.ema"),
    ],
)
def test_the_home_directory_takes_the_place_of_the_sign(override: str, expected: str, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert with_home(override) == expected


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "sdft.data", "toy", "out=~/made", "count=2", "size=32"],
        slow(["train.py", "experiment=dreamy_style", "trainer.max_steps=1", "run_dir=~/made", "verdict=none"]),
    ],
    ids=["data", "train"],
)
def test_a_command_writes_there(words: list[str], tmp_path: Path) -> None:
    env = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    words = [str(ROOT / words[0]) if words[0] == "train.py" else words[0], *words[1:]]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "made").iterdir())
    assert not (tmp_path / "~").exists()


def test_so_it_is_in_a_file_of_options(tmp_path: Path) -> None:
    """Interpolations of the folder stay."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nname: mine\nrun_dir: ~/made/${name}\ntrainer: {max_steps: 1}\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text)
    words = ["train.py", "--config-dir", f"{tmp_path}/conf", "experiment=mine", "--cfg", "job"]
    env = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    words = [str(ROOT / words[0]), *words[1:]]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert f"run_dir: {tmp_path}/made/${{name}}" in done.stdout
