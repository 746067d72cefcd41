"""Folders as people have them: links, rests of other programs, names in any case and of any bytes, empty captions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdft.data import decode
from sdft.data.datamodule import Images
from sdft.data.sharding import write_shards
from sdft.data.sources import Folder, Shards
from sdft.errors import UserError
from sdft.rng import seed_of

ROOT = Path(__file__).resolve().parents[2]


def picture(file: Path | bytes, caption: str | None = "a cat", suffix: str = ".txt", kind: str = "JPEG") -> None:
    """A picture, and its caption file."""
    name = os.fsdecode(file)
    os.makedirs(os.path.dirname(name), exist_ok=True)
    pixels = np.random.default_rng(len(name)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(name, format=kind)
    if caption is not None:
        Path(os.path.splitext(name)[0] + suffix).write_text(caption, encoding="utf-8")


def everything(root: Path, **options) -> Folder:
    return Folder(str(root), "all", **options)


def captions(root: Path, **options) -> dict[str, str]:
    source = everything(root, **options)
    return {key: source[place].caption for place, key in enumerate(source.keys)}


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "b.jpg")
    picture(tmp_path / "root" / "a.jpg")
    (tmp_path / "root" / "more").symlink_to(tmp_path / "elsewhere")
    assert list(everything(tmp_path / "root").keys) == ["a.jpg", "more/b.jpg"]


def test_a_circle_of_links_ends_and_no_folder_is_listed_twice(tmp_path: Path) -> None:
    root = tmp_path / "root"
    picture(root / "z" / "a.jpg")
    picture(tmp_path / "elsewhere" / "b.jpg")
    (root / "z" / "up").symlink_to(root)
    (root / "again").symlink_to(root / "z")
    (root / "first").symlink_to(tmp_path / "elsewhere")
    (root / "second").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    source = everything(root)
    assert list(source.keys) == ["first/b.jpg", "z/a.jpg"]
    assert source.left_out == ["4 x a link to a folder that is listed already"]


def test_rests_of_other_programs_are_left_out_and_counted(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    for rest in (".ipynb_checkpoints/a.jpg", ".Trash-1000/files/b.jpg", "__MACOSX/c.jpg", "@eaDir/d.jpg"):
        picture(tmp_path / rest)
    (tmp_path / "._a.jpg").write_bytes(b"\0\5\26\7")
    (tmp_path / "Thumbs.db").write_bytes(b"\0")
    source = everything(tmp_path)
    assert list(source.keys) == ["a.jpg"]
    assert source.left_out == ["3 x hidden: the name begins with a dot", "3 x left by an operating system"]


def test_pipes_are_left_out_and_never_opened(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "b.jpg")
    os.mkfifo(tmp_path / "a.caption")
    (tmp_path / "c.jpg").symlink_to(tmp_path / "b.jpg")
    source = everything(tmp_path)
    assert list(source.keys) == ["a.jpg"]
    assert source.left_out == ["3 x no file, but a pipe, socket or device"]


def test_a_caption_file_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", None)
    os.mkfifo(tmp_path / "a.txt")
    assert captions(tmp_path, default_caption="a picture") == {"a.jpg": "a picture"}


@pytest.mark.parametrize(
    ("image", "text"), [("A.JPG", "A.TXT"), ("a.jpg", "a.Txt"), ("IMG.JPG", "img.txt"), ("d/a.jpg", "d/a.CAPTION")]
)
def test_captions_are_found_in_any_case(image: str, text: str, tmp_path: Path) -> None:
    picture(tmp_path / image, None)
    (tmp_path / text).write_text("a dog", encoding="utf-8")
    assert captions(tmp_path, default_caption="a picture") == {image: "a dog"}


def test_an_exact_name_comes_first_and_is_nobody_elses(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", "lower")
    picture(tmp_path / "A.jpg", None)
    assert captions(tmp_path, default_caption="a picture") == {"A.jpg": "a picture", "a.jpg": "lower"}
    (tmp_path / "A.TXT").write_text("upper", encoding="utf-8")
    assert captions(tmp_path) == {"A.jpg": "upper", "a.jpg": "lower"}


def test_two_captions_that_might_be_meant_are_an_error(tmp_path: Path) -> None:
    picture(tmp_path / "IMG.jpg", None)
    for name in ("img.txt", "Img.txt"):
        (tmp_path / name).write_text("a dog", encoding="utf-8")
    with pytest.raises(UserError, match=r"has several captions \(Img.txt, img.txt\); keep one"):
        everything(tmp_path)


def test_pictures_that_cannot_be_read_here_are_counted_with_the_remedy(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(decode.OTHER_PICTURES, ".heic", "pip install pillow-heif")
    monkeypatch.setattr("sdft.data.sources.folder.IMAGE_SUFFIXES", decode.IMAGE_SUFFIXES - {".heic"})
    for number in range(6):
        (tmp_path / f"{number}.HEIC").write_bytes(b"heic")
    (tmp_path / "raw.nef").write_bytes(b"raw")
    expected = [
        "6 x a picture that cannot be read here (.heic: pip install pillow-heif)",
        "1 x a picture that cannot be read here (.nef: save it as JPEG or PNG)",
    ]
    with pytest.raises(UserError) as found:
        everything(tmp_path)
    assert all(line in str(found.value) for line in expected)
    picture(tmp_path / "a.jpg")
    source = everything(tmp_path)
    assert source.left_out == expected
    assert Images(source, source, 1, 64).left_out == expected


@pytest.mark.parametrize("text", ["", " \n", "\ufeff"])
def test_an_empty_caption_is_none(text: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", text)
    with pytest.raises(UserError, match=r"a.jpg has an empty caption; write one to a.txt .* or set data.default_cap"):
        everything(tmp_path)
    assert captions(tmp_path, default_caption="a picture") == {"a.jpg": "a picture"}
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "a table"}\n', encoding="utf-8")
    assert captions(tmp_path) == {"a.jpg": "a table"}


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv", "METADATA.CSV"])
def test_rows_end_at_newlines_only(table: str, separator: str, tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg", None)
    row = f'{{"file_name": "a.jpg", "text": "a{separator}cat"}}\n' if "jsonl" in table else f"a.jpg,a{separator}cat\r\n"
    if "jsonl" in table and ord(separator) < 32:
        row = row.replace(separator, f"\\u{ord(separator):04x}")
    text = row if "jsonl" in table else f"file_name,text\r\n{row}"
    (tmp_path / table).write_bytes(text.encode())
    assert captions(tmp_path) == {"a.jpg": "a cat"}


def test_names_that_are_not_utf_8_are_names(tmp_path: Path) -> None:
    """Listed, seeded, scanned, cached, written as shards, and printed."""
    for name in (b"caf\xe9", b"cafe", b"\xff\xfe"):
        picture(os.fsencode(tmp_path) + b"/" + name + b".jpg")
    source = everything(tmp_path)
    assert [os.fsencode(key) for key in source.keys] == [b"cafe.jpg", b"caf\xe9.jpg", b"\xff\xfe.jpg"]
    assert len({seed_of(0, "noise", key) for key in source.keys}) == 3
    assert Images(source, source, 1, 64, cache="disk", cache_dir=str(tmp_path / "cache")).train_set[0, 0]
    (shard,) = write_shards(source, tmp_path / "shards", 10)
    found = [os.fsencode(key) for key in Shards(str(shard), "all").keys]
    assert found == [b"cafe.jpg", b"caf\xe9.jpg", b"\xff\xfe.jpg"]


@pytest.mark.slow
def test_such_a_folder_is_checked_from_the_command_line(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"a", b"b"):
        picture(os.fsencode(tmp_path) + b"/pictures/" + name + b".jpg", None)
    command = [sys.executable, "-m", "sdft.data", "check", f"data.root={tmp_path / 'pictures'}", "size=64"]
    env = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run([*command, f"out={tmp_path / 'out'}"], cwd=ROOT, capture_output=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert b"caf\\udce9.jpg" in done.stdout


def test_a_link_to_a_parent_lists_nothing_twice(tmp_path: Path) -> None:
    """Folders below a link that are listed by themselves, and a link to the parent of another link's folder."""
    for place in ("lk/real", "far/a/b"):
        (tmp_path / place).mkdir(parents=True)
        for name in "xy":
            Image.new("RGB", (16, 16)).save(tmp_path / place / f"{name}.png")
    (tmp_path / "lk" / "real" / "up").symlink_to("..")
    assert list(Folder(str(tmp_path / "lk" / "real"), "all", default_caption="x").keys) == ["x.png", "y.png"]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "l1").symlink_to(tmp_path / "far" / "a" / "b")
    (tmp_path / "set" / "l2").symlink_to(tmp_path / "far" / "a")
    assert len(Folder(str(tmp_path / "set"), "all", default_caption="x").keys) == 2
