"""Broken inputs: each is named with its path before anything is learned, nothing ends in a bare traceback."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checks import full_disk
from PIL import Image

from sdft.data.datamodule import Images, folder, shards
from sdft.data.scan import readable
from sdft.data.sharding import write_shards
from sdft.data.sources import Folder
from sdft.errors import UserError

G = np.random.default_rng(0)
NOISE = Image.fromarray(G.integers(0, 256, (40, 50, 3), dtype=np.uint8))


def stored(picture: Image.Image = NOISE, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50000, 50000, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


PICTURES: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", "the file is empty"),
    "cut.jpg": (stored(form="JPEG")[:-700], "(?i)truncated"),
    "cut.png": (stored()[:-900], "(?i)truncated"),
    "text.png": (b"this is a letter, not a picture", "not a known image format"),
    "page.jpg": (b"<html>404</html>", "not a known image format"),
    "tiny.png": (stored(Image.new("RGB", (1, 1))), "only 1 x 1 pixels"),
    "bomb.png": (bomb(), "decompression bomb"),
    "moving.gif": (stored(form="GIF", save_all=True, append_images=[Image.new("RGB", (50, 40))]), "2 frames"),
    "moving.webp": (stored(form="WEBP", save_all=True, append_images=[Image.new("RGB", (50, 40))]), "2 frames"),
    "pages.tif": (stored(form="TIFF", save_all=True, append_images=[Image.new("RGB", (50, 40))]), "2 frames"),
    "profile.png": (stored(icc_profile=b"none"), "colour profile"),
    "float.tiff": (stored(Image.new("F", (50, 40), 0.5), "TIFF"), "floating-point"),
    "deep.tiff": (stored(Image.fromarray(np.full((40, 50), 70000, np.int32)), "TIFF"), "more than 16 bits"),
}


def good(root: Path, names: str = "a b c") -> None:
    root.mkdir(exist_ok=True)
    for name in names.split():
        (root / f"{name}.png").write_bytes(stored())
        (root / f"{name}.txt").write_text("a cat")


@pytest.mark.parametrize("name", PICTURES)
def test_a_broken_picture_is_named_with_its_reason(name: str, tmp_path: Path) -> None:
    content, reason = PICTURES[name]
    good(tmp_path)
    (tmp_path / name).write_bytes(content)
    expected = rf"{tmp_path / name} cannot be read as an image \(.*{reason.removeprefix('(?i)')}.*repair or remove"
    with pytest.raises(UserError, match=f"(?i){expected}"):
        folder(str(tmp_path), batch_size=2, size=32, default_caption="x")


def dangling(root: Path) -> None:
    (root / "gone.png").symlink_to(root / "nowhere.png")


def table(content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / "metadata.jsonl").write_bytes(content) and None


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a dangling link": (dangling, r"gone\.png cannot be read as an image \(No such file"),
    "no caption": (lambda r: (r / "a.txt").unlink(), r"a\.png has no caption; write one to a\.txt"),
    "an empty caption": (lambda r: (r / "a.txt").write_text(" \n"), r"a\.png has an empty caption; write one to"),
    "a caption not UTF-8": (lambda r: (r / "a.txt").write_bytes(b"caf\xe9"), r"a\.png .* not UTF-8 \(byte 3 of a\.txt"),
    "a folder as caption": (
        lambda r: ((r / "a.txt").unlink(), (r / "a.txt").mkdir()), r"a\.png has a caption that cannot be read \(a\.txt"
    ),
    "an empty folder": (lambda r: [f.unlink() for f in r.iterdir()], "found 0 images, need at least 2"),
    "a table without JSON": (table(b"{oops"), r"metadata\.jsonl line 1 is not JSON"),
    "a table not UTF-8": (table(b'{"text": "caf\xe9"}'), r"metadata\.jsonl is not UTF-8 \(byte 13\)"),
    "a table of lost pictures": (table(b'{"file_name": "z.png", "text": "x"}'), r"z\.png is named in a table"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_broken_folder_is_told(name: str, tmp_path: Path) -> None:
    spoil, complaint = FOLDERS[name]
    good(tmp_path / "in")
    spoil(tmp_path / "in")
    default = "x" if name == "a dangling link" else None
    with pytest.raises(UserError, match=rf"^data[.:].*{tmp_path}/in.*{complaint}|^data[.:].*{complaint}"):
        folder(str(tmp_path / "in"), batch_size=2, size=32, default_caption=default)


def tar(path: Path, members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> None:
    with tarfile.open(path, "w") as opened:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            info.type, info.linkname = kind, "/etc/passwd"
            opened.addfile(info, io.BytesIO(content))


def without_end(path: Path) -> None:
    """Cut behind the last file, where tar files have blocks of zeros."""
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content + bytes(-len(content) % 512))


GOOD = {"0.png": stored(), "0.txt": b"a cat", "1.png": stored(), "1.txt": b"a dog"}
SHARDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing there": (lambda p: None, r"there is no file .*s\.tar"),
    "not a tar": (lambda p: p.write_bytes(b"a letter" * 200), r"s\.tar is not a whole tar file"),
    "an empty file": (lambda p: p.write_bytes(b""), r"s\.tar is not a whole tar file"),
    "compressed": (lambda p: (tar(p, GOOD), p.write_bytes(gzip.compress(p.read_bytes()))), r"s\.tar is not a whole"),
    "cut short": (lambda p: (tar(p, GOOD), p.write_bytes(p.read_bytes()[:900])), r"not a whole .*ends inside 0"),
    "a name that points out": (lambda p: tar(p, GOOD | {"../x.png": stored()}), r"s\.tar .*'\.\./x\.png'.* points out"),
    "an absolute name": (lambda p: tar(p, GOOD | {"/etc/x.png": stored()}), r"s\.tar .*'/etc/x\.png'.* points out"),
    "a link": (lambda p: tar(p, {"0.png": b""}, tarfile.SYMTYPE), r"s\.tar:0\.png is not a regular file"),
    "one name twice, apart": (lambda p: tar(p, GOOD | {"0.PNG": stored()}), r"s\.tar:0 occurs twice: its files have"),
    "one name twice": (lambda p: tar(p, {"0.PNG": stored()} | GOOD), r"s\.tar:0\.png occurs twice"),
    "cut between files": (lambda p: (tar(p, GOOD), without_end(p)), r"not a whole .*its end is missing"),
    "two pictures": (lambda p: tar(p, {"0.jpg": stored()} | GOOD), r"s\.tar:0 has 2 images, needs one"),
    "no picture": (lambda p: tar(p, GOOD | {"2.txt": b"x"}), r"s\.tar:2 has 0 images"),
    "no caption": (lambda p: tar(p, GOOD | {"2.png": stored()}), r"s\.tar:2\.png has no caption"),
    "an empty caption": (lambda p: tar(p, GOOD | {"1.txt": b" "}), r"s\.tar:1\.png has no caption"),
    "a caption not UTF-8": (lambda p: tar(p, GOOD | {"1.txt": b"\xff"}), r"s\.tar:1 has a txt that is not UTF-8"),
    "a broken picture": (lambda p: tar(p, GOOD | {"1.png": b"x"}), r"s\.tar:1\.png cannot be read as an image"),
    "no samples": (lambda p: tar(p, {}), r"s\.tar: found 0 samples"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_a_broken_shard_is_told(name: str, tmp_path: Path) -> None:
    spoil, complaint = SHARDS[name]
    spoil(tmp_path / "s.tar")
    with pytest.raises(UserError, match=rf"^data.*{tmp_path}.*{complaint}|^data.*{complaint}"):
        shards(str(tmp_path / "s.tar"), batch_size=2, size=32)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("a/{0..2.tar", r"data\.shards=a/\{0\.\.2\.tar: an unclosed brace"),
        ("pipe:cat x.tar", r"set data\.cache_dir=DIR"),
    ],
)
def test_shard_patterns_that_mean_nothing(words: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        shards(words, batch_size=2, size=32)


def test_a_command_that_fails_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ended with status 7 \(no such bucket\)"):
        shards("pipe:echo no such bucket >&2; exit 7", batch_size=2, size=32, cache_dir=str(tmp_path))
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} == {".lock"}


def test_a_name_in_two_shards_is_told(tmp_path: Path) -> None:
    for name in ("s0.tar", "s1.tar"):
        tar(tmp_path / name, GOOD)
    message = r"s1\.tar:0\.png has the same name as a sample of .*s0\.tar, .*s1\.tar:1\.png has the same name"
    with pytest.raises(UserError, match=message):
        shards(str(tmp_path / "s{0..1}.tar"), batch_size=2, size=32)


class TestAllAtOnce:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        good(tmp_path / "in", "a b c d e f")
        for name, (content, _) in PICTURES.items():
            (tmp_path / "in" / name).write_bytes(content)
            (tmp_path / "in" / name).with_suffix(".txt").write_text("broken")
        return tmp_path / "in"

    def test_an_error_lists_every_one(self, root: Path) -> None:
        with pytest.raises(UserError, match=rf"data: {len(PICTURES)} files cannot be read as images") as told:
            folder(str(root), batch_size=2, size=32)
        assert all(str(root / name) in str(told.value) for name in PICTURES)

    def test_skip_leaves_them_out_and_replaces_none(self, root: Path) -> None:
        data = folder(str(root), batch_size=2, size=32, unreadable="skip", held_out=0.4)
        left = [*data.train_set.source.keys, *data.validation_set.source.keys]
        assert sorted(left) == [f"{name}.png" for name in "abcdef"]
        assert sorted(name for name, _ in data.skipped) == sorted(str(root / name) for name in PICTURES)
        assert {data.train_set[i, 0]["keys"] for i in range(len(data.train_set.source.keys))} <= set(left)
        assert list(readable(Folder(str(root), "all"), "skip").keys) == sorted(left)

    def test_skipping_all_is_an_error(self, tmp_path: Path) -> None:
        for name in ("a.png", "b.png"):
            (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match="no image is left"):
            folder(str(tmp_path), batch_size=2, size=32, default_caption="x", unreadable="skip")

    def test_skipping_all_that_is_held_out_says_so(self, tmp_path: Path) -> None:
        good(tmp_path, "a b c d e f")
        held_out = Folder(str(tmp_path), "validation").keys
        for name in held_out:
            (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UserError, match=rf"no held-out image is left: .*{held_out[0]}.*held_out"):
            folder(str(tmp_path), batch_size=2, size=32, unreadable="skip")

    def test_every_missing_caption_is_listed(self, root: Path) -> None:
        for name in "abc":
            (root / f"{name}.txt").unlink()
        with pytest.raises(UserError, match=r"3 images have no usable caption: .*a\.png .*b\.png .*c\.png has no"):
            Folder(str(root), "all")


def test_a_cache_folder_that_is_a_file_is_told(tiny_source, tiny_model, tmp_path: Path) -> None:
    (tmp_path / "c").write_text("x")
    model = tiny_model()
    data = Images(tiny_source(2), tiny_source(2), 2, 32, cache="disk", cache_dir=str(tmp_path / "c"))
    with pytest.raises(UserError, match=rf"data\.cache_dir: {tmp_path}/c/.* cannot be written"):
        data.encode_once(model.encode_moments, model.device, vae=model.vae)


def test_a_disk_that_fills_while_caching_is_told_and_the_build_goes_on(tiny_source, tiny_model, tmp_path: Path) -> None:
    model = tiny_model()
    data = Images(tiny_source(6), tiny_source(2, "held out"), 2, 32, cache="disk", cache_dir=str(tmp_path / "c"))
    with full_disk(3000), pytest.raises(UserError, match=rf"{tmp_path}/c/.* cannot be written \(File too large\)"):
        data.encode_once(model.encode_moments, model.device, vae=model.vae)
    assert not list((tmp_path / "c").glob("*.partial")) + list((tmp_path / "c").glob("*.safetensors"))
    data.encode_once(model.encode_moments, model.device, vae=model.vae)
    assert len(data.store) == 6, "the two that are held out are the same pictures"


def test_a_disk_that_fills_while_sharding_is_told_and_leaves_nothing_half(tmp_path: Path) -> None:
    good(tmp_path / "in")
    source = Folder(str(tmp_path / "in"), "all")
    with full_disk(4096), pytest.raises(UserError, match=r"out=.*out: the shards cannot be written \(File too"):
        write_shards(source, tmp_path / "out", per_shard=2)
    assert not list((tmp_path / "out").iterdir())
