"""How a command ends: exit codes, messages of errors that nobody foresaw, closed pipes, secrets."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import full_disk
from omegaconf import OmegaConf
from PIL import Image
from warm import WarmPython

from sdft.config import exits
from sdft.config.exits import Unbreakable, exit_for, foreseen, hidden, hide_environment
from sdft.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exits, "_secrets", {})
    monkeypatch.delenv("SDFT_DEBUG", raising=False)


def ended(error: BaseException, folder: Path | None = None) -> Any:
    with pytest.raises(SystemExit) as stop:
        exit_for(error, folder)
    return stop.value.code


def raised(error: BaseException) -> BaseException:
    """The error with a traceback."""
    with pytest.raises(type(error)) as found:
        raise error
    return found.value


FORESEEN = {
    "a full disk": (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "the disk is full (/x/y): free some"),
    "a quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full: free some space"),
    "safetensors on a full disk": (RuntimeError("Error while serializing: I/O error: x (os error 28)"), "the disk is"),
    "no right": (PermissionError(errno.EACCES, "Permission denied", "/x"), "Permission denied (/x): name another"),
    "a long name": (OSError(errno.ENAMETOOLONG, "File name too long", "/x"), "File name too long (/x)"),
    "a file as a folder": (NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x"), "Not a directory (/x)"),
    "no GPU memory": (torch.OutOfMemoryError("CUDA out of memory"), "the GPU has too little memory: dry_run=true"),
    "no memory": (MemoryError(), "this machine has too little memory"),
    "torch without memory": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "this machine has"),
    "an error of the user": (UserError("rank=0: must be greater than 0"), "rank=0: must be greater than 0"),
}


@pytest.mark.parametrize("kind", FORESEEN)
def test_what_the_user_can_mend_is_one_line_and_status_2(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    error, message = FORESEEN[kind]
    assert ended(error) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1


def test_what_nobody_foresaw_is_three_lines_with_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = raised(KeyError("some\nthing"))
    assert foreseen(error) is None
    assert ended(error, tmp_path) == 1
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == r"error: KeyError: 'some\nthing'"
    assert second == f"  its traceback is in {tmp_path}/traceback.txt; SDFT_DEBUG=1 prints it"
    assert "please report it" in third
    assert "Traceback (most recent call last)" in (tmp_path / "traceback.txt").read_text()


def test_the_log_is_elsewhere_if_there_is_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(ValueError("x"), tmp_path / "missing") == 1
    file = Path(capsys.readouterr().err.split("its traceback is in ")[1].split(";")[0])
    assert "ValueError: x" in file.read_text()
    file.unlink()


def test_debug_prints_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SDFT_DEBUG", "1")
    assert ended(raised(UserError("wrong"))) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_interrupt_has_its_own_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "\ninterrupted: the same command starts again\n"


def test_values_of_the_environment_are_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOKEN", "hf_secret_value")
    monkeypatch.setenv("RANK_OF_IT", "8")
    hide_environment(OmegaConf.create({"a": ["${oc.env:TOKEN}"], "b": {"c": "x_${oc.env:'RANK_OF_IT',4}"}}))
    assert hidden({"a": "see hf_secret_value here", "b": [8, "8"]}) == {"a": "see ${oc.env:TOKEN} here", "b": [8, "8"]}
    assert ended(UserError("data=hf_secret_value: no such file")) == 2
    assert ended(RuntimeError("hf_secret_value"), tmp_path) == 1
    assert "hf_secret" not in capsys.readouterr().err + (tmp_path / "traceback.txt").read_text()


def test_control_characters_of_a_strangers_file_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(UserError("x.safetensors: \x1b[2Jevil\x1b]0;title\x07 \u202egnp.exe, caf\u00e9")) == 2
    assert ended(RuntimeError("\x1b[2J"), tmp_path) == 1
    printed = capsys.readouterr().err
    assert "\x1b" not in printed
    assert "\u202e" not in printed
    assert r"\x1b[2Jevil\x1b]0;title\x07 \u202egnp.exe, caf\u00e9".replace(r"caf\u00e9", "caf\u00e9") in printed


def test_the_command_line_hides_them_too(python: WarmPython, tmp_path: Path) -> None:
    words = [str(ROOT / "train.py"), "data=folder", "data.root=${oc.env:TOKEN}", "logger=csv"]
    done = python.complete(words, tmp_path, TOKEN="hf_secret_value")
    assert done.returncode == 2
    assert "hf_secret" not in done.stdout + done.stderr
    assert "${oc.env:TOKEN}" in done.stderr


def test_a_stream_goes_on_without_its_reader() -> None:
    ours, theirs = os.pipe()
    stream = Unbreakable(os.fdopen(theirs, "w"))
    os.close(ours)
    for _ in range(3):
        assert stream.write("x" * 100_000) == 100_000
        stream.flush()
    assert isinstance(stream.buffer, io.BufferedWriter)


@pytest.mark.slow
def test_a_closed_pipe_does_not_stop_training(tmp_path: Path) -> None:
    """`python train.py | head -1`."""
    words = ["trainer.max_steps=2", "verdict=none", "~callbacks.previews", "logger=csv", f"run_dir={tmp_path}/run"]
    words += ["data.train.num_scenes=4", "data.validation.num_scenes=2"]
    command = f"'{sys.executable}' train.py {' '.join(words)} 2> {tmp_path}/err | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("train: 128 px")
    assert (tmp_path / "run" / "summary.json").is_file()
    errors = (tmp_path / "err").read_text()
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


@pytest.mark.parametrize("words", [["toy", "count=2", "out=new"], ["check", "data.root=d", "size=64", "out=new"]])
def test_a_full_disk_while_data_is_written_is_one_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sdft.data.__main__ as data

    monkeypatch.chdir(tmp_path)
    Image.effect_noise((64, 64), 90).save(tmp_path / "a.png")
    (tmp_path / "d").mkdir()
    for name in "abc":
        shutil.copy(tmp_path / "a.png", tmp_path / "d" / f"{name}.png")
        (tmp_path / "d" / f"{name}.txt").write_text("noise")
    monkeypatch.setattr(sys, "argv", ["sdft-data", *words])
    with full_disk(500), pytest.raises(SystemExit) as stop:
        data.main()
    assert stop.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert line.startswith("error: the disk is full")
    assert [file for file in (tmp_path / "new").rglob("*") if file.stat().st_size] == []
