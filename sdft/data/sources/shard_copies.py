"""Local copies of remote shards: fetched when they are needed, checked, and removed once they take too much space.

Opening URLs is webdataset's work, and so is removing the copies that were not used for the longest time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import select
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse

from filelock import FileLock

from sdft.data.sources.shard_urls import ShardUrl, expand, listed
from sdft.errors import UserError
from sdft.progress import tqdm
from sdft.types import Index, Positive

MAY_FETCH = ContextVar("MAY_FETCH", default=True)
"""Whether commands are run and shards fetched; false in a dry run."""
AT_A_TIME = 8
"""Shards that are fetched at the same time."""
PIECE = 1 << 20
FIRST_WAIT = 1.0
"""Seconds before the second try; each further wait is twice as long."""
STALLED_AFTER = 60.0
"""Seconds without a byte after which a connection counts as broken."""
GONE_FOR_GOOD = re.compile(r"returned error: 4(?!08|29)\d\d|\b(NoSuchKey|NoSuchBucket|AccessDenied)\b")
"""What commands say of shards that another try will not find either."""


class FailedFetch(Exception):
    """A shard did not arrive whole; the message is the reason."""


@dataclass(frozen=True)
class Arrived:
    """Size in bytes and MD5 of a shard that was fetched."""

    size: int
    md5: str

    @classmethod
    def of(cls, file: Path) -> Arrived:
        """Of a file that is here."""
        with file.open("rb") as opened:
            return cls(file.stat().st_size, hashlib.file_digest(opened, "md5").hexdigest())


Check = Callable[[Path, Arrived], None]
"""Is given a file and what arrived, before others see it; raises FailedFetch if it is not whole."""


class ShardCopies:
    """Local copies of remote shards, which any number of processes can share.

    folder: `data.cache_dir`. limit_gb: space that they may take, in 10^9 bytes; no limit if None. retries: further
    tries of a fetch that failed, with waits of 1, 2, 4, ... times FIRST_WAIT between them.
    """

    def __init__(self, folder: str | Path, limit_gb: Positive | None = None, retries: Index = 5):
        root = Path(folder).expanduser()
        self.folder, self.indexes, self.unfinished = (
            root / name for name in ("shards", "shard_index", "shards_partial")
        )
        self.limit = None if limit_gb is None else int(limit_gb * 1e9)
        self.retries = retries
        self._pool: ThreadPoolExecutor | None = None
        self._coming: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Without threads, for workers."""
        return vars(self) | {"_pool": None, "_coming": set()}

    def path(self, shard: ShardUrl) -> Path:
        """Where the copy of a shard is, or would be."""
        return self.folder / f"{name_of(shard)}.tar"

    def index(self, shard: ShardUrl) -> Path:
        """Where the index of a shard is, or would be. It stays when the copy is removed."""
        return self.indexes / f"{name_of(shard)}.index.jsonl"

    def fetched(self, shard: ShardUrl, check: Check) -> Path:
        """The copy of a shard, fetched now if there is none.

        Raises UserError naming the shard if all tries fail, or if the disk is full.
        """
        path = self.path(shard)
        if path.is_file():
            return used(path)
        if not MAY_FETCH.get():
            raise UserError(
                f"data.shards={shard.name}: dry_run=true runs no commands and fetches nothing, and there is no copy of "
                f"it in {self.folder} yet"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.unfinished.mkdir(exist_ok=True)
            partial = self.unfinished / path.name
            with FileLock(f"{partial}.lock"):
                if path.is_file():  # another process has fetched it meanwhile
                    return used(path)
                try:
                    self._fetch(shard, partial, check)
                    self._make_space(partial.stat().st_size)
                    partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"data.cache_dir={self.folder.parent}: the copy of {shard.name} cannot be stored ({error.strerror}); "
                "free some space, or set data.cache_limit_gb"
            ) from error
        return path

    def _fetch(self, shard: ShardUrl, partial: Path, check: Check) -> None:
        """Fetch a shard into a file, again after failures."""
        for attempt in range(self.retries + 1):
            try:
                arrived = download(shard, partial)
                check(partial, arrived)
                return
            except FailedFetch as failure:
                last = attempt == self.retries or bool(GONE_FOR_GOOD.search(str(failure)))
                if last or shard.url.startswith("pipe:"):
                    tries = "" if attempt == 0 else f", after {attempt + 1} tries"
                    raise UserError(f"data.shards={shard.name}: cannot be fetched ({failure}){tries}") from failure
                tqdm.write(f"{shard.name}: {failure}; trying again")
                time.sleep(FIRST_WAIT * 2**attempt)

    def read(self, shard: ShardUrl, offset: int, size: int, check: Check) -> bytes:
        """Bytes of a shard, which is fetched again if its copy was removed."""
        while True:
            path = self.fetched(shard, check)
            with contextlib.suppress(FileNotFoundError):  # removed between both lines, by another process
                return read_range(path, offset, size)

    def prefetch(self, shard: ShardUrl, check: Check) -> None:
        """Start fetching a shard that will be needed soon, in the background. What fails is told when it is read."""
        if shard.url in self._coming or self.path(shard).is_file():
            return
        self._pool = self._pool or ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="shards")
        self._coming.add(shard.url)
        self._pool.submit(self.fetched, shard, check).add_done_callback(lambda _: self._coming.discard(shard.url))

    def _make_space(self, size: int) -> None:
        """Remove the copies that were not used for the longest time, until `size` bytes fit."""
        if self.limit is None:
            return
        if size > self.limit:
            raise UserError(f"data.cache_limit_gb={self.limit / 1e9:g}: a shard of {size / 1e9:.3g} GB is larger")
        from webdataset.cache import LRUCleanup

        LRUCleanup(str(self.folder), self.limit - size, keyfn=os.path.getmtime, interval=None).cleanup()


def named(shards: str) -> list[ShardUrl]:
    """The shards of patterns joined by `::`, and of the lists (`.json`) among them, which may be URLs too.

    Raises UserError for patterns that mean nothing, for too many shards, and for files that are no lists.
    """
    found: list[ShardUrl] = []
    for url in expand(shards):
        shard = ShardUrl(url)
        if not url.endswith(".json"):
            found.append(shard)
        elif shard.is_remote:
            if not MAY_FETCH.get():
                raise UserError(f"data.shards={shard.name}: dry_run=true fetches nothing; name a list on this machine")
            with tempfile.TemporaryDirectory() as folder:
                try:
                    download(shard, Path(folder) / "list.json")
                except FailedFetch as failure:
                    raise UserError(f"data.shards={shard.name}: cannot be fetched ({failure})") from failure
                found += listed(Path(folder) / "list.json", url)
        else:
            found += listed(shard.path, url)
    return found


def name_of(shard: ShardUrl) -> str:
    """The name of the copy of a shard."""
    return hashlib.blake2b(shard.url.encode(), digest_size=12).hexdigest()


def used(path: Path) -> Path:
    """The path, its time set to now: the copies with the earliest times are removed first."""
    with contextlib.suppress(OSError):
        os.utime(path)
    return path


def read_range(file: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on."""
    with file.open("rb") as opened:
        opened.seek(offset)
        return opened.read(size)


def download(shard: ShardUrl, out: Path) -> Arrived:
    """Write what a URL or a command gives to a file. Raises FailedFetch, and OSError if the file cannot be written."""
    md5, size = hashlib.md5(usedforsecurity=False), 0
    with tempfile.TemporaryFile() as complaints, out.open("wb") as file:
        try:
            stream = opened(shard.url, complaints)
        except (OSError, ValueError, ImportError) as error:
            raise FailedFetch(missing_tool(error)) from error
        try:
            while piece := next_piece(stream):
                file.write(piece)
                md5.update(piece)
                size += len(piece)
            ended_well(stream, complaints)
        finally:
            stream.proc.kill()
            stream.proc.wait()
            stream.stream.close()
    for what, stated, found in (("bytes", shard.size, size), ("as MD5", shard.md5, md5.hexdigest())):
        if stated is not None and stated != found:
            raise FailedFetch(f"its list states {stated} {what}, and {found} arrived")
    return Arrived(size, md5.hexdigest())


def opened(url: str, complaints: IO[bytes]) -> Any:
    """webdataset's `Pipe` of a URL. Raises OSError for a missing program, ValueError for an unknown scheme.

    complaints: takes what the program writes to its standard error. webdataset's `gopen` opens what is not listed here:
    http(s) because its `curl` tries for a minute without a word, s3 because it has none, pipes for their errors.
    """
    from webdataset.gopen import Pipe, gopen, rewrite_url

    url = rewrite_url(url)
    scheme = urlparse(url).scheme
    command: str | list[str]
    if scheme == "pipe":
        command = url.removeprefix("pipe:")
    elif scheme in ("http", "https"):
        options = ["--fail", "--silent", "--show-error", "--location", "--globoff", "--connect-timeout", "30"]
        command = ["curl", *options, url]
    elif scheme == "s3":
        command = ["aws", "s3", "cp", url, "-"]
    else:
        return gopen(url, "rb")
    return Pipe(command, mode="rb", shell=scheme == "pipe", stderr=complaints)


def next_piece(stream: Any) -> bytes:
    """What has arrived since; empty at the end. Raises FailedFetch if nothing comes for STALLED_AFTER seconds."""
    file = stream.stream.fileno()
    if not select.select([file], [], [], STALLED_AFTER)[0]:
        raise FailedFetch(f"nothing arrived for {STALLED_AFTER:g} s")
    return os.read(file, PIECE)


def ended_well(stream: Any, complaints: IO[bytes]) -> None:
    """Wait for the program of a stream. Raises FailedFetch with what it said if it failed."""
    try:
        stream.wait_for_child()
    except OSError as error:
        complaints.seek(0)
        said = " ".join(complaints.read(2000).decode(errors="replace").split())
        raise FailedFetch(f"the command ended with status {stream.status} ({said or error})") from error


def missing_tool(error: Exception) -> str:
    """Why a URL cannot be opened at all."""
    if isinstance(error, FileNotFoundError):
        return f"{error.filename} is not installed"
    return " ".join(str(error).split())
