"""The order in which the samples of a run are read.

A run reads one endless sequence of samples, one random permutation of the source after another; with buckets, one such
sequence per size. Everything is a function of (run seed, position), so a resumed run continues where it stopped,
independently of workers, of ranks, and of how a global batch is split.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import Sampler

from sdft.data.source import Source, shard_numbers, shards_that_fit
from sdft.errors import UserError
from sdft.rng import generator
from sdft.types import Count

T = TypeVar("T")
BucketOrder = Callable[[Sequence[int], int, int, int], Iterator[tuple[int, int]]]
"""See `bucket_order`."""
Batch = list[tuple[int, int]]
"""(index, visit) of each sample."""
NUM_PREFETCHED = 4
"""Batches whose cached entries are prefetched: one is too few to keep a disk busy."""


class BatchOrder(Sampler[list[tuple[int, int]]]):
    """Batch sampler: batches of (index, visit) from batch number `start` to `stop`.

    A visit counts how often a sample was read before. Rank r yields its slice of each global batch.

    size: number of samples. batch_size: samples per rank.
    buckets: name -> indices of the images of one size; None puts all into one. Each optimizer step is of one bucket,
        whose samples are one endless sequence of permutations: the last batch of a pass is filled up from the next
        pass, so no sample is dropped.
    accumulate: batches per optimizer step, which are all of one bucket.
    windows: which shards are read together; None shuffles all samples.
    order: the bucket of each step.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        buckets: Mapping[str, Sequence[int]] | None = None,
        windows: ShardWindows | None = None,
        order: BucketOrder | None = None,
    ):
        self.order = order or bucket_order
        self.batch_size, self.seed, self.start, self.stop = batch_size, seed, start, stop
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.buckets, self.windows = buckets or {"": range(size)}, windows

    def batches_of_a_window(self) -> int:
        """About how many batches read the samples of the shards that are shuffled together."""
        if self.windows is None:
            return 0
        samples = len(self.windows.shard_of) * self.windows.at_once / self.windows.num_shards
        return int(samples / (self.batch_size * self.world_size)) + 1

    def __len__(self) -> int:
        return self.stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_batch = self.batch_size * self.world_size
        sizes = [len(indices) for indices in self.buckets.values()]
        streams = [ShuffledStream(indices, self.seed, name, self.windows) for name, indices in self.buckets.items()]
        first_step, part = divmod(self.start, self.accumulate)
        steps = self.order(sizes, per_batch * self.accumulate, self.seed, first_step)
        bucket, steps_before = next(steps)
        for _ in range(self.start, self.stop):
            if part == self.accumulate:
                part, (bucket, steps_before) = 0, next(steps)
            first = (steps_before * self.accumulate + part) * per_batch + self.rank * self.batch_size
            yield [streams[bucket][position] for position in range(first, first + self.batch_size)]
            part += 1


class ShardWindows:
    """The order in which a set is read `at_once` shards at a time: the shards of a pass in random order, the same for
    all buckets, and the samples of each group of shards shuffled.

    shard_of: the number of the shard of each sample.
    """

    def __init__(self, shard_of: np.ndarray, at_once: Count, seed: int):
        self.shard_of, self.at_once, self.seed = shard_of, at_once, seed
        self.num_shards = len(np.unique(shard_of))

    def of(self, indices: np.ndarray, visit: int) -> np.ndarray:
        """The number of the window of each sample in a pass."""
        num = int(self.shard_of.max()) + 1
        order = torch.randperm(num, generator=generator(self.seed, "shard order", counter=visit)).numpy()
        return np.argsort(order)[self.shard_of[indices]] // self.at_once


class ShuffledStream:
    """An endless sequence of (index, visit): one random permutation of the indices after another."""

    def __init__(self, indices: Sequence[int], seed: int, name: str, windows: ShardWindows | None = None):
        self.indices, self.seed, self.name, self.windows = indices, seed, name, windows
        self._visit, self._order = -1, torch.empty(0)

    def __getitem__(self, position: int) -> tuple[int, int]:
        visit, place = divmod(position, len(self.indices))
        if visit != self._visit:
            order = generator(self.seed, "order", self.name, visit)
            self._visit, self._order = visit, torch.randperm(len(self.indices), generator=order)
            if self.windows is not None:
                window = self.windows.of(np.asarray(self.indices)[self._order.numpy()], visit)
                self._order = self._order[np.argsort(window, kind="stable")]
        return self.indices[int(self._order[place])], visit


def bucket_order(sizes: Sequence[int], num: int, seed: int, first: int, name: str = "") -> Iterator[tuple[int, int]]:
    """(bucket, its number of earlier steps) of each optimizer step, from step `first` on.

    sizes: samples of each bucket. num: samples of a step. name: of the set of buckets, where a run has several.

    By the end of pass p over the data, a bucket of n samples has had ceil(p n / num) steps, the least number that reads
    each sample p times. The buckets of a pass are in random order.
    """
    done = [0] * len(sizes)
    visit = 0
    while True:
        due = [-(-(visit + 1) * size // num) for size in sizes]
        turns = [bucket for bucket, (a, b) in enumerate(zip(done, due, strict=True)) for _ in range(b - a)]
        if first >= len(turns):
            first, done = first - len(turns), due
        else:
            order = torch.randperm(len(turns), generator=generator(seed, "buckets", name, visit)).tolist()
            for place, turn in enumerate(order):
                if place >= first:
                    yield turns[turn], done[turns[turn]]
                done[turns[turn]] += 1
            first = 0
        visit += 1


class PrefetchOrder(Sampler[list[tuple[int, int]]]):
    """Yields the batches of an order, and passes each to `prefetch` a few batches earlier.

    prefetch_files: is given the batches too, and earlier by those of a window of shards.
    """

    def __init__(
        self,
        order: BatchOrder,
        prefetch: Callable[[list[tuple[int, int]]], None],
        prefetch_files: Callable[[list[tuple[int, int]]], None] = lambda batch: None,
    ):
        self.order, self.prefetch, self.prefetch_files = order, prefetch, prefetch_files

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        later = announced(self.order, self.prefetch_files, self.order.batches_of_a_window())
        return announced(later, self.prefetch, NUM_PREFETCHED)


def announced(batches: Iterable[Batch], announce: Callable[[Batch], None], earlier: int) -> Iterator[Batch]:
    """The batches, each passed to `announce` when that many others come before it."""
    waiting: deque[Batch] = deque()
    for batch in batches:
        announce(batch)
        waiting.append(batch)
        if len(waiting) > earlier:
            yield waiting.popleft()
    yield from waiting


def chunks(items: Sequence[T], num: int) -> Iterator[Sequence[T]]:
    """Consecutive groups of `num` items; the last may be smaller."""
    return (items[i : i + num] for i in range(0, len(items), num))


def shard_windows(
    source: Source, at_once: Count | None, seed: int, stored: bool, sample_of: Sequence[int]
) -> ShardWindows | None:
    """The windows of `data.shuffle_shards`; None where all samples are shuffled.

    stored: whether the run keeps encoded images, and reads each shard only once. sample_of: the sample of each item.
    Raises UserError for a set that needs windows and has none, and for windows of a set without shards.
    """
    if at_once is None:
        fitting = shards_that_fit(source)
        if fitting is None or stored:
            return None
        num_sides = -(-len(sample_of) // len(source.keys))  # each has a window of its own
        raise UserError(
            "data.cache_limit_gb: the shards take more space than that; set data.shuffle_shards="
            f"{max(1, fitting // num_sides)} to read them a few at a time, or data.cache=disk to keep their latents"
        )
    numbers = shard_numbers(source)
    if numbers is None:
        raise UserError(f"data.shuffle_shards={at_once}: the data has no shards; leave it null")
    return ShardWindows(numbers[np.asarray(sample_of)], at_once, seed)
