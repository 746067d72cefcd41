"""A save that fails: the previous checkpoint stays, and the message has the path and the missing space."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checks import full_disk
from small_runs import WRONG, FullFrom, Run, finish, start

from sdft.errors import UserError
from sdft.formats.training_checkpoint import VERSION, num_bytes, read_state, write_state

STATE = {"weights": {"a": torch.arange(300_000.0), "b": torch.ones(100)}, "step": 7}
SIZE = 4 * 300_100


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    write_state(STATE, tmp_path / "new" / "last.ckpt")
    back = read_state(tmp_path / "new" / "last.ckpt")
    assert back["step"] == 7
    assert torch.equal(back["weights"]["a"], STATE["weights"]["a"])
    assert num_bytes(STATE) == SIZE
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("size", [0, 100, 1000, SIZE // 2, SIZE, SIZE + 500])
def test_a_disk_that_is_full_at_any_byte_leaves_the_file_of_before(size: int, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_state({**STATE, "step": 6}, path)
    with full_disk(size), pytest.raises(UserError) as raised:
        write_state(STATE, path)
    assert read_state(path)["step"] == 6
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"], "nothing half written stays"
    for words in (str(path), "It needs 1.2 MB", "are free", "last.ckpt is intact", "resume="):
        assert words in str(raised.value)


@contextmanager
def disk(folder: Path, options: str) -> Iterator[Path]:
    """A small disk of its own."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting a disk needs root: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_real_disk_that_is_full(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "size=2m") as folder:
        write_state(STATE, folder / "last.ckpt")
        with pytest.raises(UserError, match=r"last\.ckpt: .*No space left.* needs 1\.2 MB, and 0\.\d MB are free"):
            write_state(STATE, folder / "last.ckpt")
        assert read_state(folder / "last.ckpt")["step"] == 7
        assert os.listdir(folder) == ["last.ckpt"]


def test_a_disk_that_can_only_be_read(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "size=9m") as folder:
        write_state(STATE, folder / "last.ckpt")
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        with pytest.raises(UserError, match=r"last\.ckpt: .*Read-only.*is intact"):
            write_state(STATE, folder / "last.ckpt")
        with pytest.raises(UserError, match=r"best\.ckpt: .*Read-only"):
            write_state(STATE, folder / "best.ckpt")
        assert read_state(folder / "last.ckpt")["step"] == 7


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "no checkpoint"])
def test_a_damaged_checkpoint_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_state(STATE, path)
    whole = {"state_dict": STATE["weights"], "global_step": 6, "callbacks": {}, "loops": {}, VERSION: "2.6"}
    write_state(whole, tmp_path / "step_000006.ckpt")
    write_state(STATE, tmp_path / "step_000007.ckpt")  # of another program
    (tmp_path / "step_000008.ckpt").write_bytes(b"text" * 99)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {"cut": content[: len(content) // 2], "empty": b"", "flipped": content, "no checkpoint": b"text" * 99}
    path.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"resume: \S+last\.ckpt is damaged .* resume=\S+step_000006\.ckpt"):
        read_state(path)


@pytest.mark.parametrize(("strategy", "world_size"), [("one", 1), ("ddp", 2)])
def test_a_run_on_a_full_disk_ends_on_all_ranks_with_its_last_checkpoint(
    strategy: str, world_size: int, tmp_path: Path
) -> None:
    run = Run(tmp_path, strategy=strategy, save_every=2, validate_every=6, callbacks=[FullFrom(3, 20_000)])
    assert finish(start(run, world_size)) == [WRONG] * world_size
    assert read_state(run.last)["global_step"] == 2
    for rank in range(world_size):
        assert f"{run.last}: the checkpoint cannot be written" in (tmp_path / f"error_{rank}.txt").read_text()


def test_validation_cannot_save_its_best_either(tmp_path: Path) -> None:
    run = Run(tmp_path, save_every=2, validate_every=3, callbacks=[FullFrom(2, 20_000)])
    assert finish(start(run)) == [WRONG]
    assert "best.ckpt: the checkpoint cannot be written" in (tmp_path / "error_0.txt").read_text()
    assert read_state(run.last)["global_step"] == 2
