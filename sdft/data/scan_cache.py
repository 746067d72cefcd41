"""What was seen in picture files, remembered from start to start, so that none is decoded twice.

A file is known by its stamp (path, size, times) or by the SHA-256 of its bytes; both change with the bytes, so nothing
stale can be found. Any number of processes share a record, and losing it costs time only. Does not know how pictures
are looked at.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path
from typing import NamedTuple

import PIL

RULES = 1
"""Counts the changes of what `decode.examine` accepts: another number, and every picture is looked at anew."""
SETTLED_SECONDS = 2
"""A file system's clock may tick as rarely: a file written twice within a tick shows one time."""
ROWS_AT_ONCE = 1000
TABLE = "CREATE TABLE IF NOT EXISTS seen (name TEXT PRIMARY KEY, digest TEXT, h INT, w INT, problem TEXT)"


class ImageFacts(NamedTuple):
    """One picture file."""

    digest: str
    """SHA-256 of its bytes"""
    h: int
    w: int
    """as it is shown; 0 where it cannot be"""
    problem: str
    """why it cannot be shown; empty where it can"""


class ScanCache:
    """Rows of `ImageFacts` under stamps and digests, in one file of `folder`; the user's cache folder where that is None.

    Where the file cannot be used (a full disk, no rights, no locks), nothing is known and nothing is kept.
    """

    def __init__(self, folder: str | None = None):
        place = Path(folder).expanduser() if folder else user_cache()
        self._db: sqlite3.Connection | None = None
        self._waiting: list[tuple] = []
        with contextlib.suppress(OSError, sqlite3.Error):
            place.mkdir(parents=True, exist_ok=True)
            file = place / f"seen-{RULES}-pillow{PIL.__version__}.sqlite"
            db = sqlite3.connect(file, timeout=60, check_same_thread=False)
            db.execute(TABLE)
            self._db = db

    def find(self, name: str | None) -> ImageFacts | None:
        """What is known under a stamp or digest."""
        if self._db is None or name is None:
            return None
        try:
            row = self._db.execute("SELECT digest, h, w, problem FROM seen WHERE name = ?", (name,)).fetchone()
        except sqlite3.Error:
            return None
        return ImageFacts(*row) if row else None

    def keep(self, stamp: str | None, seen: ImageFacts) -> None:
        """Remember a picture; it is on disk after `flush`, or when enough have come together."""
        self._waiting += [(name, *seen) for name in (stamp, seen.digest) if name is not None]
        if len(self._waiting) >= ROWS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if self._db is not None and self._waiting:
            with contextlib.suppress(sqlite3.Error), self._db:
                self._db.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?, ?, ?, ?)", self._waiting)
        self._waiting = []


def user_cache() -> Path:
    """Where this user keeps what can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sdft"


def stamp_of(file: Path) -> str | None:
    """Words that change whenever the bytes of a file do; None where it has changed too lately to be sure of that."""
    try:
        stat = file.stat()
    except OSError:
        return None
    if time.time_ns() - stat.st_ctime_ns < SETTLED_SECONDS * 1e9:
        return None
    return f"{os.path.abspath(file)} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
