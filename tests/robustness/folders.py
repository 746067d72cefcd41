"""Run folders in which training goes on although somebody else made them: their locks, and links among their files."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from robustness.attempt import EVAL, MERGE, ONE_IMAGE, SHORT, TRAIN, Try
from robustness.inputs import old_run, picture, pictures

CLEAR = "\x1b[2J\x1b]0;mine\x07"
HERE = {"host": socket.gethostname(), "boot": "", "pid": 1, "began": "x", "started": "today", "count": 0}
if (BOOT := Path("/proc/sys/kernel/random/boot_id")).is_file():
    HERE["boot"] = BOOT.read_text(encoding="ascii").strip()


def locks() -> Iterator[Try]:
    """Rests of locks, and files that are none."""

    def lock(folder: Path, content: Any) -> None:
        (folder / "run").mkdir()
        written = content if isinstance(content, str) else json.dumps(content)
        (folder / "run" / ".lock").write_text(written, encoding="utf-8")

    for what, content in {
        "empty": "",
        "text": "locked",
        "a list": [1],
        "a number": 7,
        "an object": {},
        "nested 100,000 deep": "[" * 100_000,
        "a process that ended": {**HERE, "pid": 2**22 + 1},
        "a process of a number with 30 digits": {**HERE, "pid": 10**30},
        "a process of a number with 400 digits": {**HERE, "pid": 10**400},
        "all processes": {**HERE, "pid": -1},
        "a process that is text": {**HERE, "pid": "../../etc/passwd"},
        "a process that is true": {**HERE, "pid": True},
        "a host that is a list": {**HERE, "host": [1, 2]},
        "another host": {**HERE, "host": "elsewhere", "boot": "x"},
        "another host that clears the screen": {**HERE, "host": CLEAR, "boot": "x"},
        "a start that is an object": {**HERE, "pid": os.getpid(), "began": {}},
    }.items():
        yield Try("locks", what, [*TRAIN, *SHORT], partial(lock, content=content), code=0)

    special: dict[str, tuple[Callable[[Path], Any], int | None]] = {
        "a pipe": (os.mkfifo, None),
        "a folder": (os.mkdir, 2),
        "a link to a device": (partial(os.symlink, "/dev/zero"), None),
        "a link to a file": (partial(os.symlink, "../mine"), None),
        "a link to nothing": (partial(os.symlink, "nowhere"), None),
        "a link to itself": (partial(os.symlink, ".lock"), None),
    }

    def make_special(folder: Path, make: Callable[[Path], Any]) -> None:
        (folder / "mine").write_text("mine")
        (folder / "run").mkdir()
        make(folder / "run" / ".lock")

    for what, (make, code) in special.items():
        yield Try("locks", what, [*TRAIN, *SHORT], partial(make_special, make=make), code=code)


def links() -> Iterator[Try]:
    """Links in the folder that a command writes to: what they point to stays as it is."""

    def linked(folder: Path, name: str, inside: str) -> None:
        (folder / "mine").write_text("mine")
        path = folder / inside / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(os.path.relpath(folder / "mine", path.parent))

    written = ["receipt.json", "summary.json", "hparams.yaml", "metrics.csv", "lora.safetensors"]
    written += ["lora_kohya.safetensors", "checkpoints/last.ckpt", ".hydra/config.yaml", ".hydra/overrides.yaml"]
    written += [".hydra/hydra.yaml", "before_after.png", "checkpoints/best.ckpt", "train.log", "traceback.txt"]
    for name in written:
        make = partial(linked, name=name, inside="run")
        yield Try("links", f"train: {name}", [*TRAIN, *SHORT], make, code=None)
        yield Try("links", f"resume: {name}", [*TRAIN, *SHORT, "resume=auto"], make, code=None)
    for name in ("report.html", "results.csv", "results.json", "grid.png", "results.parquet", ".hydra/config.yaml"):
        make = partial(linked, name=name, inside="compared")
        yield Try("links", f"compare: {name}", [*EVAL, *ONE_IMAGE, "subjects={it: nano}"], make, code=None)
    merge = [*MERGE, "a=nano", "b=nano", "to=folder", "config=nano"]
    for name in ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"):
        make = partial(linked, name=name, inside="out")
        yield Try("links", f"merge: {name}", [*merge, "out=out", "overwrite=true"], make, code=None)
    make = partial(linked, name="o.safetensors", inside=".")
    words = [*MERGE, "a=nano", "b=nano", "out=o.safetensors", "overwrite=true"]
    yield Try("links", "merge: a file", words, make, code=None)

    def toy(folder: Path) -> None:
        linked(folder, "00000.png", "t")

    yield Try("links", "toy", ["-m", "sdft.data", "toy", "count=2", "out=t"], toy)

    def shards(folder: Path) -> None:
        pictures(folder, captions=True)
        linked(folder, "000000.tar", "s")

    yield Try("links", "shard", ["-m", "sdft.data", "shard", "root=d", "out=s"], shards, code=None)


def printed_names() -> Iterator[Try]:
    """What commands print of files that they can read."""

    def images(folder: Path, name: str, caption: str) -> None:
        for number in range(4):
            picture(folder / "d" / f"{name}{number}.png")
            (folder / "d" / f"{name}{number}.txt").write_text(f"{caption}{number}", encoding="utf-8")

    def broken(folder: Path) -> None:
        images(folder, "a", "a cat")
        (folder / "d" / f"{CLEAR.replace('/', '')}.png").write_bytes(b"x")
        (folder / "d" / f"{CLEAR.replace('/', '')}.heic").write_bytes(b"x")

    check = ["-m", "sdft.data", "check", "data.root=d", "out=o", "size=64", "data.bucket_step=16"]
    for what, make in {
        "a name": partial(images, name=CLEAR, caption="a cat"),
        "a caption": partial(images, name="a", caption=CLEAR),
        "a broken picture": broken,
    }.items():
        yield Try("control sequences", f"check, {what}", check, make, code=None)
        words = ["-m", "sdft.data", "shard", "root=d", "out=s"]
        yield Try("control sequences", f"shard, {what}", words, make, code=None)
        train = [*TRAIN, *SHORT[:-2], "data=folder", "data.root=d"]
        yield Try("control sequences", f"train, {what}", train, make, code=None)
    make = partial(old_run, **{".hydra__overrides.yaml": json.dumps([f"name={CLEAR}"])})
    words = [*EVAL, *ONE_IMAGE, "subjects={it: old}"]
    yield Try("control sequences", "compare, an override", words, make, code=None)
