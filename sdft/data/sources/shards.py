"""Tar shards in WebDataset's layout: the members of a sample share their name up to the first dot.

A shard is indexed once, which makes samples accessible by index: runs shuffle and resume exactly as with single files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from sdft.data.captions import Captions, Tags, checked_template, checked_texts
from sdft.data.decode import IMAGE_SUFFIXES, StoredImage
from sdft.data.error_messages import join_problems
from sdft.data.packed_strings import Concatenated, PackedStrings, repeated
from sdft.data.scan_cache import stamp_of
from sdft.data.source import Sample, StoredSource
from sdft.data.sources import metadata
from sdft.data.sources.splits import Split, split_indices
from sdft.errors import UserError
from sdft.types import Fraction, NonNegative

INDEX_SUFFIX = ".index.jsonl"
MAX_SHARDS = 100_000
COMMANDS_RUN = ContextVar("COMMANDS_RUN", default=True)
"""Whether `pipe:` shards run their commands; false in a dry run."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample: key, name, offset and size of the image member in the shard, captions and their weights."""

    key: str
    member: str
    offset: int
    size: int
    texts: tuple[str, ...]
    weights: tuple[float, ...] = ()

    def packed(self) -> str:
        """The entry as one line of JSON."""
        return json.dumps([self.key, self.member, self.offset, self.size, self.texts, self.weights])

    @classmethod
    def unpacked(cls, line: str) -> Entry:
        key, member, offset, size, texts, weights = json.loads(line)
        return cls(key, member, offset, size, tuple(texts), tuple(weights))


class Shards(StoredSource):
    """Images in tar shards: `0001.jpg` with `0001.txt`, and `0001.short.txt` or `0001.json` for more captions.

    shards: paths with brace patterns, `data/{0000..0012}.tar`, joined by `::`. The output of `pipe:COMMAND` is
        stored in `cache_dir` once.
    split, held_out, caption, default_caption, tags, loss_weight: as in `Folder`.
    cache_dir: folder for the output of commands.

    Raises UserError for missing, damaged or incomplete shards, naming all problems of a shard.
    """

    def __init__(
        self,
        shards: str,
        split: Split,
        held_out: Fraction = 0.1,
        caption: str = "{caption}",
        default_caption: str | None = None,
        tags: Tags | None = None,
        loss_weight: NonNegative = 1.0,
        cache_dir: str | None = None,
    ):
        self.loss_weight, self.tags = loss_weight, tags
        self.template = checked_template("data.caption", caption)
        self.files = [local(url, cache_dir) for url in expand(shards)]
        self._stamps = [stamp_of(file) for file in self.files]
        self._lines = [read_index(file) for file in self.files]
        self._all = Concatenated(map(len, self._lines))
        self._places = np.arange(len(self._all))
        keys = self._checked_keys(default_caption)
        if len(keys) < (1 if split == "all" else 2):
            raise UserError(f"data.shards={shards}: found {len(keys)} samples, need at least 2")
        self._places = split_indices(keys, split, held_out)
        self._default = default_caption or ""
        self.keys = PackedStrings(keys[place] for place in self._places)

    def _entry(self, index: int) -> tuple[int, Entry]:
        """(number of the shard, entry) of a sample."""
        number, row = self._all.locate(self._places[index])
        return number, Entry.unpacked(self._lines[number][row])

    def stored(self, index: int) -> StoredImage:
        """The image member of a sample."""
        number, entry = self._entry(index)
        file, stamp = self.files[number], self._stamps[number]
        return StoredImage(
            f"{file}:{entry.member}",
            lambda: read_range(file, entry.offset, entry.size),
            lambda: f"{stamp} {entry.offset} {entry.size}" if stamp else None,
        )

    def __getitem__(self, index: int) -> Sample:
        _, entry = self._entry(index)
        captions = Captions(entry.texts or (self._default,), entry.weights, self.template, self.tags)
        return Sample(entry.key, self.stored(index), captions.plain, self.loss_weight, captions=captions)

    def _checked_keys(self, default: str | None) -> PackedStrings:
        """The keys of all samples. Raises UserError naming all duplicates and samples without caption."""
        keys, wrong = PackedStrings(), []
        for place in range(len(self._places)):
            number, entry = self._entry(place)
            keys.append(entry.key)
            if not entry.texts and default is None:
                wrong.append(f"{self.files[number]}:{entry.member} has no caption")
        for later, earlier in repeated(keys):
            here, there = (self.files[self._entry(place)[0]] for place in (later, earlier))
            wrong.append(f"{here}:{keys[later]} has the same name as a sample of {there}")
        if wrong:
            raise UserError(
                f"data.shards: {join_problems(wrong)}; write the shards again, or set data.default_caption='...' for "
                "samples without a caption"
            )
        return keys


def expand(shards: str) -> list[str]:
    """The paths and commands of a brace pattern."""
    from braceexpand import braceexpand

    for low, high, step in re.findall(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}", shards):
        if abs(int(high) - int(low)) // max(abs(int(step or 1)), 1) >= MAX_SHARDS:
            pattern = f"{{{low}..{high}}}"
            raise UserError(f"data.shards: {pattern} are more than {MAX_SHARDS:,} shards; name those that exist")
    try:
        urls = (url for pattern in shards.split("::") for url in braceexpand(pattern))
        found = list(itertools.islice(urls, MAX_SHARDS + 1))
    except (ValueError, RecursionError) as error:
        reason = "braces in braces too deep" if isinstance(error, RecursionError) else f"an unclosed brace ({error})"
        raise UserError(f"data.shards={shards[:200]}: {reason}") from error
    if len(found) > MAX_SHARDS:
        raise UserError(f"data.shards={shards[:200]}: are more than {MAX_SHARDS:,} shards; name those that exist")
    return found


def local(url: str, cache_dir: str | None) -> Path:
    """The local file of a shard; the output of a command is stored atomically."""
    if not url.startswith("pipe:"):
        path = Path(url).expanduser()
        if not path.is_file():
            raise UserError(f"data.shards: there is no file {path}")
        return path
    if cache_dir is None:
        raise UserError(f"data.shards={url}: set data.cache_dir=DIR, where its output is stored")
    folder = Path(cache_dir).expanduser() / "shards"
    path = folder / f"{hashlib.blake2b(url.encode(), digest_size=12).hexdigest()}.tar"
    if path.is_file():
        return path
    if not COMMANDS_RUN.get():
        raise UserError(f"data.shards={url}: dry_run=true runs no commands, and its output is not in {cache_dir} yet")
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as out:
            done = subprocess.run(url.removeprefix("pipe:"), shell=True, stdout=out, stderr=subprocess.PIPE)
        if done.returncode:
            message = " ".join(done.stderr.decode(errors="replace").split())
            raise UserError(f"data.shards={url}: the command ended with status {done.returncode} ({message})")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"data.cache_dir={cache_dir}: {url} cannot be stored ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_range(file: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on."""
    with file.open("rb") as opened:
        opened.seek(offset)
        return opened.read(size)


def read_index(file: Path) -> PackedStrings:
    """The entries of a shard, packed: from its index file if that matches the shard, else from the shard itself.

    The index is then written if possible. Its first line has size and modification time of the shard and the number of
    samples, each further line one entry.
    """
    stat = file.stat()
    index = file.with_name(file.name + INDEX_SUFFIX)
    try:
        with index.open(encoding="utf-8") as opened:
            head = json.loads(next(opened))
            kept = PackedStrings(line.rstrip() for line in opened if Entry.unpacked(line))
        if head == [stat.st_size, stat.st_mtime_ns, len(kept)]:
            return kept
    except (OSError, ValueError, TypeError, StopIteration):
        pass  # missing, outdated or damaged: read the shard itself
    found = PackedStrings(entry.packed() for entry in read_shard(file))
    partial = index.with_name(f"{index.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as written:
            written.write(json.dumps([stat.st_size, stat.st_mtime_ns, len(found)]) + "\n")
            written.writelines(line + "\n" for line in found)
        partial.replace(index)
    except OSError:
        partial.unlink(missing_ok=True)  # a read-only folder: the shard is read again next time
    return found


def read_shard(file: Path) -> list[Entry]:
    """The samples of a shard, in order. Raises UserError naming all of its problems."""
    parts: dict[str, dict[str, tarfile.TarInfo]] = {}
    wrong = []
    for member in members(file):
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"data.shards: {file} has a member {member.name!r}, which points out of it; do not use it")
        if member.isdir():
            continue
        stem, _, suffix = path.name.partition(".")
        key = (path.parent / stem).as_posix()
        if not member.isreg():
            wrong.append(f"{file}:{member.name} is not a regular file")
        elif suffix.lower() in parts.setdefault(key, {}):
            wrong.append(f"{file}:{member.name} occurs twice")
        else:
            parts[key][suffix.lower()] = member
    entries = []
    with file.open("rb") as opened:
        for key, by_suffix in parts.items():
            try:
                entries.append(entry_of(key, by_suffix, opened))
            except ValueError as error:
                wrong.append(f"{file}:{key} {error}")
    if wrong:
        raise UserError(f"data.shards: {join_problems(wrong)}; write the shard again")
    return entries


def members(file: Path) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(file, "r:") as tar:
            size = file.stat().st_size
            while (member := tar.next()) is not None:
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"ends inside {member.name}")
                yield member
                tar.members.clear()  # type: ignore[attr-defined]  # else all members stay in memory
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"data.shards: {file} is not a whole tar file ({error}); fetch or write it again") from error


def entry_of(key: str, parts: dict[str, tarfile.TarInfo], opened) -> Entry:
    """One sample. Raises ValueError with the reason if it is not complete."""
    pictures = [suffix for suffix in parts if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES]
    if len(pictures) != 1:
        raise ValueError(f"has {len(pictures)} images, needs one ({', '.join(sorted(parts))})")

    def text(suffix: str) -> str:
        member = parts[suffix]
        opened.seek(member.offset_data)
        try:
            return opened.read(member.size).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"has a {suffix} that is not UTF-8 (byte {error.start})") from error

    picture = parts[pictures[0]]
    place = (key, picture.name, picture.offset_data, picture.size)
    plain = sorted((s for s in parts if s.rpartition(".")[2] in ("txt", "caption")), key=lambda s: (s.count("."), s))
    if plain:
        return Entry(*place, checked_texts([text(suffix) for suffix in plain]))
    if "json" in parts:
        row = json.loads(text("json"))
        if isinstance(row, dict) and any(row.get(column) is not None for column in metadata.CAPTION_COLUMNS):
            return Entry(*place, *metadata.texts_of(row))
    return Entry(*place, ())
