"""Damaged models, LoRAs, run folders, shards and tables."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from robustness.attempt import (
    MARK,
    OLD_RUN,
)
from sdft.models.nano import WEIGHTS


def nano_file() -> Path:
    """nano as a single file, made once for these weights."""
    known = [(file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(WEIGHTS.rglob("*.safetensors"))]
    name = f"sdft_tries_nano_{os.getuid()}_{hashlib.md5(repr(known).encode()).hexdigest()[:12]}.safetensors"
    if not (path := Path(tempfile.gettempdir()) / name).is_file():
        from sdft.formats.model_checkpoint import open_checkpoint
        from sdft.formats.single_file import write_single_file

        part = path.with_suffix(f".{os.getpid()}")
        write_single_file(open_checkpoint("in", WEIGHTS), part)
        part.replace(path)
    return path


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: Any, rest: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def changed(content: bytes, change: Callable[[dict[str, Any], str], Any]) -> bytes:
    """A safetensors file after `change` of its header, called with the name of a tensor."""
    header, rest = header_of(content)
    change(header, [name for name in header if name != "__metadata__"][:4][-1])
    return with_header(header, rest)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "b")
    return buffer.getvalue()


class Evil:
    """Leaves the mark when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARK}",)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda c: b"",
    "seven bytes": lambda c: c[:7],
    "cut in the header": lambda c: c[:300],
    "cut in the weights": lambda c: c[: len(c) // 2],
    "one byte short": lambda c: c[:-1],
    "one byte more": lambda c: c + b"x",
    "a header of no length": lambda c: bytes(8) + c[8:],
    "a header of 2^63 bytes": lambda c: (2**63 - 1).to_bytes(8, "little") + c[8:],
    "a header that is no JSON": lambda c: with_header(b"x" * 400, header_of(c)[1]),
    "a header that is a list": lambda c: with_header([1, 2], header_of(c)[1]),
    "a header of nested lists": lambda c: with_header(b"[" * 100_000, b""),
    "an entry that is text": lambda c: changed(c, lambda h, n: h.update({n: "x"})),
    "an unknown dtype": lambda c: changed(c, lambda h, n: h[n].update(dtype="F7")),
    "an integer dtype": lambda c: changed(c, lambda h, n: h[n].update(dtype="I32")),
    "a negative shape": lambda c: changed(c, lambda h, n: h[n].update(shape=[-1])),
    "a huge shape": lambda c: changed(c, lambda h, n: h[n].update(shape=[2**62, 4])),
    "offsets beyond the end": lambda c: changed(c, lambda h, n: h[n].update(data_offsets=[0, 2**40])),
    "offsets that overlap": lambda c: changed(c, lambda h, n: h[n].update(data_offsets=[0, 8])),
    "offsets of three": lambda c: changed(c, lambda h, n: h[n].update(data_offsets=[0, 1, 2])),
    "metadata that are numbers": lambda c: changed(c, lambda h, n: h.update(__metadata__={"a": 1})),
    "a tensor renamed": lambda c: changed(c, lambda h, n: h.update({"surprise": h.pop(n)})),
    "a tensor missing": lambda c: changed(c, lambda h, n: h.pop(n)),
    "a name of 10,000 letters": lambda c: changed(c, lambda h, n: h.update({"x" * 10_000: h.pop(n)})),
    "a pickle": lambda c: pickle.dumps({"state_dict": {}}),
    "a pickle that runs a command": lambda c: pickle.dumps(Evil()),
    "a zip": lambda c: zipped(),
    "a page of the web": lambda c: b"<html><body>404 Not Found</body></html>" * 9,
    "zeros": lambda c: bytes(4096),
    "a picture": lambda c: b"\x89PNG\r\n\x1a\n" + bytes(99),
}


def write(file: str, content: Callable[[], bytes], folder: Path) -> None:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content())


def alias(number: int) -> str:
    """Nine times the alias before."""
    before, own = chr(97 + number), chr(98 + number)
    return f"{own}: &{own} [{','.join([f'*{before}'] * 9)}]\n"


TEXTS = {
    "empty": "",
    "a list": "- a\n- b\n",
    "a number": "7\n",
    "a word": "word\n",
    "null": "null\n",
    "true": "true",
    "no YAML": "a: [1\nb: }",
    "a tab": "a:\n\t- b",
    "a tag": "a: !!python/object/apply:os.system [touch the_attack_ran]\n",
    "an alias bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(map(alias, range(9))),
    "an alias of itself": "a: &a [*a]\n",
    "nested 10,000 deep": "a: " + "[" * 10_000,
    "binary": "\0\1\2\3\x7f\x80",
    "a circle": "a: ${b}\nb: ${a}\n",
    "an interpolation of nothing": "a: ${nowhere}\n",
    "the environment": "a: ${oc.env:HOME}\n",
    "a number of 10,000 digits": "a: " + "9" * 10_000,
}
JSONS = {
    "empty": "",
    "a list": "[1, 2]",
    "a number": "7",
    "a text": '"x"',
    "null": "null",
    "cut": '{"overrides": ["ra',
    "binary": "\0\1\2\x80",
    "nested 100,000 deep": "[" * 100_000,
    "an object without keys": "{}",
    "outputs alone": '{"outputs": {}}',
    "overrides that are text": '{"overrides": "rank=4", "outputs": {}}',
    "overrides of numbers": '{"overrides": [1, 2], "outputs": {}}',
    "outputs that are a list": '{"overrides": [], "outputs": []}',
    "an override that is none": '{"overrides": ["==="], "outputs": {}}',
    "config that is text": '{"overrides": ["rank=2"], "outputs": {}, "figures": {}, "config": "x"}',
    "threads that are text": '{"overrides": ["rank=2"], "outputs": {}, "figures": {}, "config": {}, "threads": "x"}',
}


def text(file: str, content: str, folder: Path) -> None:
    write(file, lambda: content.encode("latin-1"), folder)


def old_run(folder: Path, **files: str | bytes | None) -> None:
    """The run of a fixture, with some files replaced (`__` stands for `/`), or removed."""
    shutil.copytree(OLD_RUN, folder / "old")
    shutil.copy(OLD_RUN / "lora.safetensors", folder / "old" / "lora_kohya.safetensors")
    shutil.copy(OLD_RUN / "checkpoints" / "last.ckpt", folder / "old" / "checkpoints" / "step_000002.ckpt")
    (folder / "old" / "before_after.png").write_bytes(png())
    for name, content in files.items():
        path = folder / "old" / name.replace("__", "/")
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content.encode("latin-1") if isinstance(content, str) else content)


def old_sweep(folder: Path, **files: str | bytes | None) -> None:
    old_run(folder, **files)
    (folder / "sweep").mkdir()
    shutil.move(folder / "old", folder / "sweep" / "0")
    old_run(folder)
    shutil.move(folder / "old", folder / "sweep" / "1")


def saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), "red").save(path)


def pictures(folder: Path, table: str = "", name: str = "metadata.csv", captions: bool = False) -> None:
    for number in range(4):
        picture(folder / "d" / f"{number}.png")
        if captions:
            (folder / "d" / f"{number}.txt").write_text("a cat")
    if table:
        (folder / "d" / name).write_bytes(table.encode("latin-1"))


def tar_with(folder: Path, *members: tuple[str, bytes | tarfile.TarInfo]) -> None:
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def special(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "png")
    return buffer.getvalue()
