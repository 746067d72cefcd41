"""What is where in a tar shard, so that its samples are accessible by index.

Members are grouped into samples as the library webdataset does: neighbours with the same name up to the first dot.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sdft.data.captions import checked_texts
from sdft.data.decode import IMAGE_SUFFIXES
from sdft.data.error_messages import join_problems
from sdft.data.packed_strings import PackedStrings
from sdft.data.sources import metadata
from sdft.errors import UserError

MASK = "mask.png"
"""Suffix of the mask in a sample."""
INDEX_SUFFIX = ".index.jsonl"
FORMAT = 3
"""Of index files; others are made again."""
Identity = list[int | str]
"""What tells the bytes of a shard from others: size and time of a local file, size and MD5 of a remote one."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample: key, name, offset and size of the image member in the shard, captions and their weights, offset and
    size of its mask.

    The key is the name of the image: that of the member, or `file_name` of the sample's JSON.
    """

    key: str
    member: str
    offset: int
    size: int
    texts: tuple[str, ...]
    weights: tuple[float, ...] = ()
    mask: tuple[int, int] | None = None

    def packed(self) -> str:
        """The entry as one line of JSON."""
        return json.dumps([self.key, self.member, self.offset, self.size, self.texts, self.weights, self.mask])

    @classmethod
    def unpacked(cls, line: str) -> Entry:
        key, member, offset, size, texts, weights, mask = json.loads(line)
        return cls(key, member, offset, size, tuple(texts), tuple(weights), tuple(mask) if mask else None)


class ShardDamaged(UserError):
    """A shard is not a whole tar file."""


def kept_index(index: Path, identity: Identity | None = None) -> tuple[Identity, PackedStrings] | None:
    """(identity, entries) of an index file; None if it is missing, damaged, or of another identity than the given."""
    try:
        with index.open(encoding="utf-8") as opened:
            version, found, num = json.loads(next(opened))
            entries = PackedStrings(line.rstrip() for line in opened if Entry.unpacked(line))
        whole = version == FORMAT and len(entries) == num and (identity is None or found == identity)
        return (found, entries) if whole else None
    except (OSError, ValueError, TypeError, StopIteration):
        return None


def write_index(index: Path, identity: Identity, entries: PackedStrings) -> None:
    """Write an index file: a line with its format, the identity of the shard and the number of entries, then the
    entries. Nothing is written in a folder that is read-only: the shard is read again next time."""
    partial = index.with_name(f"{index.name}.{os.getpid()}.partial")
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as written:
            written.write(json.dumps([FORMAT, identity, len(entries)]) + "\n")
            written.writelines(line + "\n" for line in entries)
        partial.replace(index)
    except OSError:
        partial.unlink(missing_ok=True)


def index_of(file: Path) -> PackedStrings:
    """The entries of a local shard: from the index file beside it if that matches, else from the shard itself.

    The index is then written if possible. Raises UserError naming all problems of the shard.
    """
    stat = file.stat()
    identity: Identity = [stat.st_size, stat.st_mtime_ns]
    index = file.with_name(file.name + INDEX_SUFFIX)
    if kept := kept_index(index, identity):
        return kept[1]
    found = PackedStrings(entry.packed() for entry in read_shard(file, str(file)))
    write_index(index, identity, found)
    return found


def read_shard(file: Path, name: str) -> list[Entry]:
    """The samples of a shard, in order.

    name: of the shard in messages. Raises ShardDamaged, and UserError naming all problems of its samples.
    """
    from webdataset.tariterators import group_by_keys

    wrong: list[str] = []
    entries = []

    def note(error: Exception) -> bool:
        wrong.append(f"{name}:{str(error.args[0]).partition(': duplicate')[0]} occurs twice")
        return True

    samples = group_by_keys(regular_members(file, name, wrong), handler=note)
    seen: set[str] = set()
    with file.open("rb") as opened:
        for sample in samples:
            key = sample.pop("__key__")
            sample.pop("__url__")
            try:
                if key in seen:
                    raise ValueError("occurs twice: its files have to be neighbours (tar --sort=name)")
                seen.add(key)
                entries.append(entry_of(key, sample, opened))
            except ValueError as error:
                wrong.append(f"{name}:{key} {error}")
    if wrong:
        raise UserError(f"data.shards: {join_problems(wrong)}; write the shard again")
    return entries


def regular_members(file: Path, name: str, wrong: list[str]) -> Iterator[dict]:
    """The files in a shard, as webdataset names them. What is wrong is added to `wrong`."""
    for member in members(file, name):
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(f"data.shards: {name} has a member {member.name!r}, which points out of it; do not use it")
        if member.isdir() or path.name.startswith("__"):
            continue  # webdataset's own notes are of no sample
        if not member.isreg():
            wrong.append(f"{name}:{member.name} is not a regular file")
        elif "." in path.name:
            yield {"fname": path.as_posix(), "data": member, "__url__": name}
        else:
            wrong.append(f"{name}:{member.name} has no suffix")


def members(file: Path, name: str) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file, without their content. Raises ShardDamaged if it is not whole."""
    try:
        with tarfile.open(file, "r:") as tar:
            size, end = file.stat().st_size, 0
            while (member := tar.next()) is not None:
                end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"ends inside {member.name}")
                yield member
                tar.members.clear()  # type: ignore[attr-defined]  # else all members stay in memory
            if size < end + tarfile.BLOCKSIZE:
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ShardDamaged(f"data.shards: {name} is not a whole tar file ({error}); fetch or write it again") from error


def entry_of(key: str, parts: dict[str, tarfile.TarInfo], opened) -> Entry:
    """One sample. Raises ValueError with the reason if it is not complete."""
    masking = parts.pop(MASK, None)
    mask = (masking.offset_data, masking.size) if masking else None
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
    row = json.loads(text("json")) if "json" in parts else {}
    row = row if isinstance(row, dict) else {}
    named = row.get("file_name")
    place = (
        named if isinstance(named, str) and named else picture.name,
        picture.name,
        picture.offset_data,
        picture.size,
    )
    plain = sorted((s for s in parts if s.rpartition(".")[2] in ("txt", "caption")), key=lambda s: (s.count("."), s))
    if plain:
        texts = [text(suffix) for suffix in plain]
        if any(words and not words.isspace() for words in texts):
            return Entry(*place, checked_texts([words for words in texts if words and not words.isspace()]), mask=mask)
    if any(row.get(column) is not None for column in metadata.CAPTION_COLUMNS):
        return Entry(*place, *metadata.texts_of(row), mask=mask)
    return Entry(*place, (), mask=mask)
