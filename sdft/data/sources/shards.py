"""Tar shards in WebDataset's layout: the members of a sample share their name up to the first dot.

A shard is indexed once, which makes samples accessible by index: runs shuffle and resume exactly as with single files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from sdft.data.captions import Captions, Tags, checked_template
from sdft.data.decode import StoredImage
from sdft.data.error_messages import complain, join_problems
from sdft.data.packed_strings import Concatenated, PackedStrings, repeated
from sdft.data.scan_cache import stamp_of
from sdft.data.source import Sample, StoredSource
from sdft.data.sources.shard_copies import AT_A_TIME, Arrived, FailedFetch, ShardCopies, named, read_range
from sdft.data.sources.shard_index import Entry, Identity, ShardDamaged, index_of, kept_index, read_shard, write_index
from sdft.data.sources.shard_urls import ShardUrl
from sdft.data.sources.splits import Split, split_indices
from sdft.data.threads import in_threads
from sdft.errors import UserError
from sdft.progress import tqdm
from sdft.types import Fraction, Index, NonNegative, Positive

ENOUGH_FOR_A_BAR = 4


class Shard(Protocol):
    """One tar file, wherever it is."""

    name: str
    """for messages"""
    entries: PackedStrings
    size: int
    """in bytes"""

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the file."""

    def stamp(self) -> str | None:
        """A text that changes whenever the bytes do; None if there is none."""

    def prefetch(self) -> None:
        """Start fetching the file, if it is not here."""


class LocalShard:
    """A shard on this machine."""

    def __init__(self, file: Path):
        if not file.is_file():
            raise UserError(f"data.shards: there is no file {file}")
        self.file, self.name = file, str(file)
        self.entries, self._stamp, self.size = index_of(file), stamp_of(file), file.stat().st_size

    def read(self, offset: int, size: int) -> bytes:
        return read_range(self.file, offset, size)

    def stamp(self) -> str | None:
        return self._stamp

    def prefetch(self) -> None:
        pass


class RemoteShard:
    """A shard that is copied to this machine when it is needed. It is known by its size and MD5, and has to stay the
    same: another one under the same URL is an error."""

    def __init__(self, shard: ShardUrl, copies: ShardCopies):
        self.shard, self.name, self.copies = shard, shard.name, copies
        self._kept = kept_index(copies.index(shard))
        if self._kept is None:
            file = copies.fetched(shard, self._check)  # which makes the index, unless the copy was there
            if self._kept is None:
                try:
                    self._check(file, Arrived.of(file))
                except FailedFetch as failure:
                    what = f"{file}, the copy of {self.name}, {failure}"
                    raise UserError(f"data.cache_dir: {what}; remove it") from failure
        assert self._kept is not None
        (size, md5), self.entries = self._kept
        self.size, self._md5 = int(size), str(md5)

    def _check(self, file: Path, arrived: Arrived) -> None:
        """Whether a fetched shard is whole and the one that was indexed; makes the index at the first time."""
        identity: Identity = [arrived.size, arrived.md5]
        if self._kept is None:
            try:
                entries = PackedStrings(entry.packed() for entry in read_shard(file, self.name))
            except ShardDamaged as error:
                raise FailedFetch(str(error).removeprefix("data.shards: ").removeprefix(f"{self.name} ")) from error
            write_index(self.copies.index(self.shard), identity, entries)
            self._kept = identity, entries
        elif self._kept[0] != identity:
            raise UserError(
                f"data.shards={self.name}: is another file than when the run began or its index was made "
                f"({arrived.size:,} bytes now, {self.size:,} then); remove {self.copies.index(self.shard)} to take it"
            )

    def read(self, offset: int, size: int) -> bytes:
        return self.copies.read(self.shard, offset, size, self._check)

    def stamp(self) -> str | None:
        return f"shard {self.size} {self._md5}"

    def prefetch(self) -> None:
        self.copies.prefetch(self.shard, self._check)


class Shards(StoredSource):
    """Images in tar shards: `0001.jpg` with `0001.txt`, and `0001.short.txt` or `0001.json` for more captions.

    shards: paths and URLs with brace patterns, `data/{0000..0012}.tar`, joined by `::`; also lists of shards (`.json`,
        as `wids` has them). Local files are read where they are. `http(s)://`, `s3://`, `gs://`, `hf://` and the output
        of `pipe:COMMAND` are copied to `cache_dir` and checked.
    split, held_out, caption, default_caption, tags, loss_weight: as in `Folder`.
    cache_dir: folder of the copies. cache_limit_gb: space they may take, in 10^9 bytes. retries: of a failed fetch.

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
        cache_limit_gb: Positive | None = None,
        retries: Index = 5,
    ):
        self.loss_weight, self.tags = loss_weight, tags
        self.template = checked_template("data.caption", caption)
        copies = None if cache_dir is None else ShardCopies(cache_dir, cache_limit_gb, retries)
        self._limit = copies.limit if copies else None
        self.shards = opened(named(shards), copies)
        self._all = Concatenated(len(shard.entries) for shard in self.shards)
        self._places = np.arange(len(self._all))
        keys = self._checked_keys(default_caption)
        if len(keys) < (1 if split == "all" else 2):
            raise UserError(f"data.shards={shards}: found {len(keys)} samples, need at least 2")
        self._places = split_indices(keys, split, held_out)
        self._default = default_caption or ""
        self.keys = PackedStrings(keys[place] for place in self._places)

    def _entry(self, index: int) -> tuple[Shard, Entry]:
        """(shard, entry) of a sample."""
        number, row = self._all.locate(self._places[index])
        return self.shards[number], Entry.unpacked(self.shards[number].entries[row])

    def shards_that_fit(self) -> int | None:
        """As many as leave space for those that are read before and after them."""
        sizes = [shard.size for shard in self.shards if isinstance(shard, RemoteShard)]
        if self._limit is None or sum(sizes) <= self._limit:
            return None
        return max(1, self._limit // max(sizes) // 3)

    def stored(self, index: int) -> StoredImage:
        """The image member of a sample."""
        shard, entry = self._entry(index)
        return self._member(shard, entry.member, entry.offset, entry.size)

    def _member(self, shard: Shard, name: str, offset: int, size: int) -> StoredImage:
        return StoredImage(
            f"{shard.name}:{name}",
            partial(shard.read, offset, size),
            lambda: f"{stamp} {offset} {size}" if (stamp := shard.stamp()) else None,
        )

    def mask(self, index: int) -> StoredImage | None:
        shard, entry = self._entry(index)
        return self._member(shard, f"{entry.member} (mask)", *entry.mask) if entry.mask else None

    def shard_numbers(self) -> np.ndarray:
        """The number of the shard of each sample."""
        return self._all.numbers(self._places)

    def prefetch(self, indices: Sequence[int]) -> None:
        for number in np.unique(self._all.numbers(self._places[list(indices)])):
            self.shards[number].prefetch()

    def __getitem__(self, index: int) -> Sample:
        _, entry = self._entry(index)
        captions = Captions(entry.texts or (self._default,), entry.weights, self.template, self.tags)
        return Sample(entry.key, self.stored(index), captions.plain, self.loss_weight, captions=captions)

    def _checked_keys(self, default: str | None) -> PackedStrings:
        """The keys of all samples. Raises UserError naming all duplicates and samples without caption."""
        keys, wrong = PackedStrings(), []
        for place in range(len(self._places)):
            shard, entry = self._entry(place)
            keys.append(entry.key)
            if not entry.texts and default is None:
                wrong.append(f"{shard.name}:{entry.member} has no caption")
        for later, earlier in repeated(keys):
            here, there = (self._entry(place)[0].name for place in (later, earlier))
            wrong.append(f"{here}:{keys[later]} has the same name as a sample of {there}")
        if wrong:
            remedy = "write the shards again, or set data.default_caption='...' for samples without a caption"
            complain(UserError(f"data.shards: {join_problems(wrong)}; {remedy}"))
        return keys


def opened(urls: Sequence[ShardUrl], copies: ShardCopies | None) -> list[Shard]:
    """The shards of some URLs with their indexes; several are fetched at a time, with a bar if that takes long."""
    if copies is None and (remote := [url.name for url in urls if url.is_remote]):
        raise UserError(f"data.shards={remote[0]}: set data.cache_dir=DIR, where copies of remote shards are stored")

    def open_one(url: ShardUrl) -> Shard:
        return RemoteShard(url, copies) if url.is_remote and copies else LocalShard(url.path)

    found = in_threads(open_one, urls, threads=AT_A_TIME)
    return list(tqdm(found, "indexing", len(urls), unit="shard", disable=len(urls) < ENOUGH_FOR_A_BAR, leave=False))
