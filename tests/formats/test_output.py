"""Files and folders are put in place whole, and replace nothing that is not a model's."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path

import pytest
from checks import full_disk

from sdft.errors import UserError
from sdft.formats.output import atomic_output, foreign_files, no_room, refuse_to_replace


def model(folder: Path, *more: str) -> Path:
    """A folder with the files of a model, and others."""
    names = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json"]
    names += ["unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "text_encoder/pytorch_model.bin"]
    names += ["text_encoder/model.safetensors.index.json", "tokenizer/vocab.json", "tokenizer/merges.txt"]
    names += ["tokenizer_2/special_tokens_map.json", "scheduler/scheduler_config.json", ".DS_Store"]
    for name in [*names, *more]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_a_model_is_replaced_whole(tmp_path: Path) -> None:
    out = model(tmp_path / "out")
    assert foreign_files(out) == []
    with atomic_output(out, "out", overwrite=True) as written:
        written.mkdir()
        (written / "new").write_text("new")
        assert (out / "model_index.json").exists(), "the old one stays until the new one is whole"
    assert [file.name for file in out.iterdir()] == ["new"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


FOREIGN = [
    "notes.txt",
    "unet/mine.py",
    "samples/1.png",
    "README.md",
    "unet/more/x.safetensors",
    "controlnet/config.json",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_part_of_a_model_is_named_and_stays(name: str, tmp_path: Path) -> None:
    out = model(tmp_path / "out", name)
    shown = {
        "samples/1.png": "samples/",
        "unet/more/x.safetensors": "unet/more",
        "controlnet/config.json": "controlnet/",
    }
    with pytest.raises(UserError, match=rf"out=.*would be deleted: {shown.get(name, name)}; move them away"):
        refuse_to_replace(out, "out", overwrite=True)
    with pytest.raises(UserError, match="exists already"), atomic_output(out, "out"):
        raise AssertionError("nothing is written")
    assert (out / name).read_text() == name


def test_many_are_counted(tmp_path: Path) -> None:
    out = model(tmp_path / "out", *(f"{i}.txt" for i in range(8)))
    with pytest.raises(UserError, match=r"0\.txt, 1\.txt, 2\.txt, 3\.txt, 4\.txt and 3 more;"):
        refuse_to_replace(out, "out", overwrite=True)


def test_a_linked_part_is_foreign(tmp_path: Path) -> None:
    """Replacing it would not delete what it points to, but what the user meant by it."""
    out = model(tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    (out / "feature_extractor").symlink_to(tmp_path / "elsewhere")
    assert foreign_files(out) == ["feature_extractor/"]


def test_a_full_disk_leaves_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    out.write_text("old")
    message = r"out=.*needs 2\.0 MiB, .* free there \(File too large\); make room .*; what was there before is intact"
    with (
        full_disk(1000),
        pytest.raises(UserError, match=message),
        atomic_output(out, "out", overwrite=True, num_bytes=2**21) as written,
    ):
        written.write_bytes(bytes(2**21))
    assert out.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_other_errors_come_through(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_output(tmp_path / "x", "out"):
        raise KeyError("x")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """Of a process that is gone, an hour ago, and nothing that was to be replaced."""
    host, dead = socket.gethostname(), 2**22 + 5
    names = [f".writing-{host}-{dead}-old", f".writing-{host}-{os.getpid()}-x", f".writing-elsewhere-{dead}-x"]
    names += [f".writing-{host}-{dead}-new", f".writing-{host}-{dead}-replaced"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / ("replaced" if name.endswith("replaced") else "half")).write_text("x")
        long_ago = time.time() - (10 if name.endswith("new") else 4000)
        for path in (*(tmp_path / name).iterdir(), tmp_path / name):
            os.utime(path, (long_ago, long_ago))
    with atomic_output(tmp_path / "new", "out") as written:
        written.write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "new"])


def test_the_words_of_a_full_disk() -> None:
    assert no_room(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert no_room(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert no_room(OSError(errno.EACCES, "Permission denied")) is None
    assert no_room(RuntimeError("Permission denied (os error 13)")) is None
