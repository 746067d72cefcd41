"""What is remembered of pictures: a second start decodes none, and nothing stale is believed."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdft.data import scan as scan_module
from sdft.data import scan_cache as scan_cache_module
from sdft.data.scan import readable, scan
from sdft.data.scan_cache import ScanCache, stamp_of, user_cache
from sdft.data.sharding import write_shards
from sdft.data.sources import Folder, Shards

TICK = 0.05
"""Seconds in which the file systems of test machines do tick."""


@pytest.fixture
def looks(monkeypatch) -> list[int]:
    """The lengths of all files that were decoded while scanning."""
    seen, examine = [], scan_module.examine
    monkeypatch.setattr(scan_module, "examine", lambda content: (seen.append(len(content)), examine(content))[1])
    monkeypatch.setattr(scan_cache_module, "SETTLED_SECONDS", TICK)
    return seen


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five pictures, one of them broken, that have lain there for a while."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(4):
        picture(i).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    time.sleep(2 * TICK)
    return folder


def picture(shade: int) -> Image.Image:
    return Image.fromarray(np.full((20, 30 + shade, 3), shade, np.uint8))


def seen(source, folder: Path):
    found = scan(source, ScanCache(str(folder)))
    return found.hw_N2.tolist(), found.digests_N32.tolist(), found.problems


@pytest.mark.parametrize("stored", ["folder", "shards"])
def test_a_second_start_decodes_nothing_and_sees_the_same(stored: str, root: Path, tmp_path: Path, looks) -> None:
    source = Folder(str(root), "all", default_caption="x")
    if stored == "shards":
        write_shards(source, tmp_path / "out", per_shard=3)
        time.sleep(2 * TICK)
        source = Shards(str(tmp_path / "out" / "{000000..000001}.tar"), "all")
    first = seen(source, tmp_path / "c")
    assert len(looks) == 5
    assert [hw[1] for hw in first[0]] == [30, 31, 32, 33, 0]
    assert seen(source, tmp_path / "c") == first
    assert len(looks) == 5
    assert "not a known image format" in first[2][4][1]


def test_a_second_start_does_not_even_read(root: Path, tmp_path: Path, looks) -> None:
    """Files are known by their stamps: without the right to read them, they are still known."""
    source = Folder(str(root), "all", default_caption="x")
    first = seen(source, tmp_path / "c")
    stamps = [source.stored(i).stamp() for i in range(5)]
    assert len(set(stamps)) == 5
    source.stored, stored = lambda i: Unread(stored(i)), source.stored
    assert seen(source, tmp_path / "c") == first


class Unread:
    """A picture whose bytes nobody may ask for."""

    def __init__(self, picture):
        self.name, self.stamp = picture.name, picture.stamp


def test_exactly_what_changed_is_looked_at_again(root: Path, tmp_path: Path, looks) -> None:
    source = Folder(str(root), "all", default_caption="x")
    before = seen(source, tmp_path / "c")
    looks.clear()
    stat = (root / "1.png").stat()
    content = bytearray((root / "1.png").read_bytes())
    content[-20] ^= 1
    (root / "1.png").write_bytes(content)
    os.utime(root / "1.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and date: the bytes decide
    after = seen(source, tmp_path / "c")
    assert looks == [stat.st_size]
    assert [i for i in range(5) if before[1][i] != after[1][i]] == [1]
    assert after[2].keys() == {1, 4}
    picture(9).save(root / "broken.png")
    assert seen(source, tmp_path / "c")[2].keys() == {1}


def test_a_picture_that_moved_is_known_by_its_bytes(root: Path, tmp_path: Path, looks) -> None:
    seen(Folder(str(root), "all", default_caption="x"), tmp_path / "c")
    root.rename(tmp_path / "elsewhere")
    seen(Folder(str(tmp_path / "elsewhere"), "all", default_caption="x"), tmp_path / "c")
    assert len(looks) == 5


def test_a_file_just_written_has_no_stamp(tmp_path: Path, monkeypatch) -> None:
    """A second write within one tick of the clock would show the same time."""
    monkeypatch.setattr(scan_cache_module, "SETTLED_SECONDS", 3600)
    (tmp_path / "a").write_text("x")
    assert stamp_of(tmp_path / "a") is None
    assert stamp_of(tmp_path / "gone") is None


@pytest.mark.parametrize("spoil", ["a file for a folder", "no database", "another table"])
def test_without_a_record_pictures_are_read(spoil: str, root: Path, tmp_path: Path, looks) -> None:
    place = tmp_path / "c"
    source = Folder(str(root), "all", default_caption="x")
    if spoil == "a file for a folder":
        place.write_text("x")
    elif spoil == "no database":
        seen(source, place)
        (file,) = place.iterdir()
        file.write_bytes(b"no database " * 1000)
    else:
        seen(source, place)
        (file,) = place.iterdir()
        with sqlite3.connect(file) as db:
            db.execute("DROP TABLE seen")
            db.execute("CREATE VIEW seen AS SELECT 1 AS name")
    looks.clear()
    assert seen(source, place)[2].keys() == {4}
    assert len(looks) == 5


def test_it_lies_in_the_cache_folder_or_the_user_s(root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert user_cache() == tmp_path / "own" / "sdft"
    source = Folder(str(root), "all", default_caption="x")
    assert len(readable(source, "skip").keys) == 4
    assert len(list(user_cache().glob("seen-*.sqlite"))) == 1
    readable(source, "skip", str(tmp_path / "c"))
    assert len(list((tmp_path / "c").glob("seen-*.sqlite"))) == 1
