"""Results of scanning image files, cached between runs so that no file is decoded twice for it.

A file is identified by its stamp (path, size, modification times) or by the SHA-256 of its bytes. Both change with the
bytes, so no result is stale. Any number of processes can share a cache, and deleting it costs only time.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path
from typing import NamedTuple

import PIL

from sdft.data.packed_strings import printable

RULES = 1
"""Version of what `decode.examine` accepts; with another number every image is scanned again."""
SETTLED_SECONDS = 2
"""Resolution of the coarsest file system's times: a file written twice within it may show the same time."""
ROWS_AT_ONCE = 1000
TABLE = "CREATE TABLE IF NOT EXISTS seen (name TEXT PRIMARY KEY, digest TEXT, h INT, w INT, problem TEXT)"


class ImageFacts(NamedTuple):
    """What a scan found in one image file."""

    digest: str
    """SHA-256 of its bytes"""
    h: int
    w: int
    """in pixels, after EXIF orientation; 0 if it cannot be decoded"""
    problem: str
    """why it cannot be decoded; empty if it can"""


class ScanCache:
    """`ImageFacts` by stamp and by digest, in an SQLite file in `folder`; in the user's cache folder if it is None.

    The file is made once an image was scanned: sources without files leave none. If it cannot be used (full disk,
    permissions, locks), nothing is found and nothing is stored.
    """

    def __init__(self, folder: str | None = None):
        place = Path(folder).expanduser() if folder else user_cache()
        self._file = place / f"seen-{RULES}-pillow{PIL.__version__}.sqlite"
        self._db: sqlite3.Connection | None = None
        self._pending: list[tuple] = []
        with contextlib.suppress(OSError):
            if self._file.is_file():
                self._open()

    def _open(self) -> None:
        with contextlib.suppress(OSError, sqlite3.Error):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self._file, timeout=60, check_same_thread=False)
            db.execute(TABLE)
            self._db = db

    def find(self, name: str | None) -> ImageFacts | None:
        """The facts of a stamp or digest."""
        if self._db is None or name is None:
            return None
        try:
            row = self._db.execute("SELECT digest, h, w, problem FROM seen WHERE name = ?", (name,)).fetchone()
        except sqlite3.Error:
            return None
        return ImageFacts(*row) if row else None

    def add(self, stamp: str | None, facts: ImageFacts) -> None:
        """Store the facts of an image; they are on disk after `flush`, or once enough are pending."""
        self._pending += [(name, *facts) for name in (stamp, facts.digest) if name is not None]
        if len(self._pending) >= ROWS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Write the pending rows."""
        if self._db is None and self._pending:
            self._open()
        if self._db is not None and self._pending:
            with contextlib.suppress(sqlite3.Error), self._db:
                self._db.executemany("INSERT OR IGNORE INTO seen VALUES (?, ?, ?, ?, ?)", self._pending)
        self._pending = []


def user_cache() -> Path:
    """The cache folder of this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sdft"


def stamp_of(file: Path) -> str | None:
    """A text that changes whenever the bytes of a file do; None if its times are too recent to be reliable."""
    try:
        stat = file.stat()
    except OSError:
        return None
    if time.time_ns() - stat.st_ctime_ns < SETTLED_SECONDS * 1e9:
        return None
    return f"{printable(os.path.abspath(file))} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
