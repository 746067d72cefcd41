"""More inputs as people have them, each with what is right: read, or named with the reason."""

from __future__ import annotations

import io
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdft.data.scan import readable
from sdft.data.sources import Folder
from sdft.errors import UserError


def picture(mode: str = "RGB", size: tuple[int, int] = (32, 24), **options: object) -> bytes:
    g = np.random.default_rng(0)
    file = io.BytesIO()
    image = Image.fromarray(g.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
    image.save(file, **({"format": "PNG"} | options))
    return file.getvalue()


def file(name: str, content: bytes | str) -> Callable[[Path], object]:
    """Writes one more file."""

    def write(root: Path) -> None:
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def table(content: str, name: str = "metadata.jsonl") -> Callable[[Path], object]:
    """A table instead of caption files."""

    def write(root: Path) -> None:
        for caption in root.glob("*.txt"):
            caption.unlink()
        file(name, content)(root)

    return write


def rows(*pairs: tuple[str, object]) -> str:
    return "\n".join(json.dumps({"file_name": name, "text": text}) for name, text in pairs)


BOTH = (("a.png", "one"), ("b.png", "two"))

READ: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "line ends of Windows": (file("a.txt", "one\r\n"), ["one", "two"]),
    "a byte order mark": (file("a.txt", b"\xef\xbb\xbfone"), ["one", "two"]),
    "several lines": (file("a.txt", "one\nand more\n\n"), ["one and more", "two"]),
    "braces and percents": (file("a.txt", "{cat} %s {0}"), ["{cat} %s {0}", "two"]),
    "a caption of a megabyte": (file("a.txt", "word " * 200_000), ["word " * 199_999 + "word", "two"]),
    "only an emoji": (file("a.txt", "🐈"), ["🐈", "two"]),
    "from right to left": (file("a.txt", "חתול אדום"), ["חתול אדום", "two"]),
    "a table of Excel": (table("\ufefffile_name,text\r\na.png,one\r\nb.png,two\r\n", "metadata.csv"), ["one", "two"]),
    "a line end in quotes": (
        table('file_name,text\na.png,"one\nmore"\nb.png,two\n', "metadata.csv"),
        ["one more", "two"],
    ),
    "a comma in quotes": (
        table('file_name,text\na.png,"one, more"\nb.png,two\n', "metadata.csv"),
        ["one, more", "two"],
    ),
    "more columns": (table("id,file_name,text,stars\n1,a.png,one,3\n2,b.png,two,4\n", "metadata.csv"), ["one", "two"]),
    "blank lines in a table": (table(f"\n{rows(*BOTH)}\n\n"), ["one", "two"]),
    "the name of a table in capitals": (table(rows(*BOTH), "METADATA.JSONL"), ["one", "two"]),
    "paths with a dot": (table(rows(("./a.png", "one"), ("b.png", "two"))), ["one", "two"]),
    "paths of Windows": (
        lambda r: (file("sub/c.png", picture())(r), table(rows(*BOTH, (r"sub\c.png", "three")))(r)),
        ["one", "two", "three"],
    ),
    "names composed otherwise": (
        lambda r: (
            file(unicodedata.normalize("NFD", "é.png"), picture())(r),
            table(rows(*BOTH, (unicodedata.normalize("NFC", "é.png"), "three")))(r),
        ),
        ["one", "two", "three"],
    ),
    "a caption named after the whole file": (lambda r: os.rename(r / "a.txt", r / "a.png.txt"), ["one", "two"]),
    "one caption for two formats": (file("a.jpg", picture(format="JPEG")), ["one", "one", "two"]),
    "names with signs": (
        lambda r: [
            file(f"{n}{s}", c)(r) for n in ("-x", "y #%&+;=[]{}") for s, c in ((".png", picture()), (".txt", n))
        ],
        ["-x", "one", "two", "y #%&+;=[]{}"],
    ),
    "a line end in a name": (lambda r: [file("c\nd.png", picture())(r), file("c\nd.txt", "x")(r)], ["one", "two", "x"]),
    "a name of 250 bytes": (
        lambda r: [file("c" * 250 + ".png", picture())(r), file("c" * 250 + ".txt", "x")(r)],
        ["one", "two", "x"],
    ),
    "a folder named like an image": (lambda r: (r / "x.jpg").mkdir(), ["one", "two"]),
    "a folder of images in a folder named like one": (
        lambda r: [file("x.jpg/c.png", picture())(r), file("x.jpg/c.txt", "x")(r)],
        ["one", "two", "x"],
    ),
    "films, archives and notes beside": (
        lambda r: [file(n, b"x")(r) for n in ("film.mp4", "old.zip", "notes.md", "a.json", "a.npz")],
        ["one", "two"],
    ),
    "a JPEG called PNG": (file("a.png", picture(format="JPEG")), ["one", "two"]),
    "a GIF of one frame": (
        lambda r: [file("c.gif", picture(format="GIF"))(r), file("c.txt", "x")(r)],
        ["one", "two", "x"],
    ),
    "a scan of one bit": (file("a.png", picture("1")), ["one", "two"]),
    "CMYK": (lambda r: [file("c.jpg", picture("CMYK", format="JPEG"))(r), file("c.txt", "x")(r)], ["one", "two", "x"]),
    "a palette with transparency": (file("a.png", picture("P", transparency=3)), ["one", "two"]),
    "half-transparent grey": (file("a.png", picture("LA")), ["one", "two"]),
    "a TIFF": (lambda r: [file("c.tiff", picture(format="TIFF"))(r), file("c.txt", "x")(r)], ["one", "two", "x"]),
    "an old bitmap": (lambda r: [file("c.bmp", picture(format="BMP"))(r), file("c.txt", "x")(r)], ["one", "two", "x"]),
    "a page named JFIF": (
        lambda r: [file("c.jfif", picture(format="JPEG"))(r), file("c.txt", "x")(r)],
        ["one", "two", "x"],
    ),
    "a caption in capitals of another word": (lambda r: os.rename(r / "a.txt", r / "A.Txt"), ["one", "two"]),
}

NAMED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a caption in UTF-16": (
        file("a.txt", "one".encode("utf-16")),
        r"a\.png has a caption that is not UTF-8 \(byte 0 of a\.txt",
    ),
    "zeros in a caption": (file("a.txt", b"\0\0\0\0"), r"a\.png has a caption with a zero byte"),
    "semicolons": (
        table("file_name;text\na.png;one\nb.png;two\n", "metadata.csv"),
        r"metadata\.csv has no column file_name in its first line; write file_name,text",
    ),
    "a list instead of lines": (
        table(json.dumps([{"file_name": "a.png", "text": "one"}])),
        r"metadata\.jsonl line 1 is no JSON object",
    ),
    "JSON over several lines": (
        table(json.dumps({"file_name": "a.png"}, indent=1)),
        r"metadata\.jsonl line 1 is not JSON",
    ),
    "no header": (table("a.png,one\nb.png,two\n", "metadata.csv"), r"metadata\.csv has no column file_name"),
    "a quote that is not closed": (
        table('file_name,text\na.png,"one\nb.png,two\n', "metadata.csv"),
        r"metadata\.csv, in the row of line 2: a quote that is not closed",
    ),
    "addresses instead of names": (
        table(rows(("https://x.org/a.png", "one"), *BOTH)),
        r"https:/x\.org/a\.png is named in a table but does not exist|https://x\.org/a\.png is named",
    ),
    "paths out of the folder": (
        table(rows(("../a.png", "one"), *BOTH)),
        r"\.\./a\.png is named in a table but does not exist",
    ),
    "an image twice": (table(rows(*BOTH, ("./a.png", "three"))), r"line 3 names \./a\.png, which has a row already"),
    "numbers as captions": (
        table(rows(("a.png", 3), ("b.png", "two"))),
        "line 1 has a caption that is neither text nor a list of texts",
    ),
    "an empty file": (file("a.png", b""), r"a\.png cannot be read as an image \(the file is empty\)"),
    "a page of an error": (
        file("a.png", b"<!doctype html><html>404</html>"),
        r"a\.png cannot be read as an image \(not a known image format\)",
    ),
    "half a JPEG": (
        file("a.png", picture(format="JPEG", size=(200, 200))[:2000]),
        r"a\.png cannot be read as an image \(",
    ),
    "a film as GIF": (
        lambda r: [
            file("c.gif", picture(format="GIF", save_all=True, append_images=[Image.new("RGB", (32, 24))]))(r),
            file("c.txt", "x")(r),
        ],
        r"c\.gif cannot be read as an image \(animated or multi-page: 2 frames",
    ),
    "a line of pixels": (
        file("a.png", picture(size=(3000, 2))),
        r"a\.png cannot be read as an image \(only 3000 x 2 pixels\)",
    ),
    "two captions that differ in case": (
        lambda r: [os.rename(r / "a.txt", r / "A.txt"), file("a.TXT", "more")(r)],
        r"a\.png has several captions \(A\.txt, a\.TXT\)",
    ),
    "only what cannot be read": (
        lambda r: [os.rename(f, f.with_suffix(".cr2")) for f in r.glob("*.png")],
        r"found 0 images, need at least 1 .*; 2 x a picture that cannot be read here \(\.cr2: save it as JPEG or PNG\)",
    ),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in BOTH:
        file(name, picture())(tmp_path)
        file(name.replace(".png", ".txt"), text)(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", READ)
def test_it_is_read(name: str, root: Path) -> None:
    spoil, captions = READ[name]
    spoil(root)
    source = readable(Folder(str(root), "all"))
    found = [source[i].caption for i in range(len(source.keys))]
    assert sorted(found) == sorted(captions)
    assert all(source[i].image_HWC.shape == (24, 32, 3) for i in range(len(source.keys)))


@pytest.mark.parametrize("name", NAMED)
def test_it_is_named(name: str, root: Path) -> None:
    spoil, complaint = NAMED[name]
    spoil(root)
    with pytest.raises(UserError, match=rf"^data.*{complaint}"):
        readable(Folder(str(root), "all"))


def test_there_are_forty() -> None:
    assert len(READ) + len(NAMED) >= 40
