"""Samples in their order: which sample is read at which position of the run, and how it is cut and captioned.

A run is one endless sequence of samples, a fresh permutation of the source after another; with buckets, one such
sequence for each size. Everything here is a function of (run seed, position), so a resumed run goes on where it
stopped, whatever the workers, the ranks, or how a step's batch is divided among them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from sdft.batch import Batch
from sdft.data.buckets import nearest_bucket
from sdft.data.captions import Captions
from sdft.data.decode import Encoded
from sdft.data.images import Crop, Cut, cut_image, plan_cut
from sdft.errors import UserError
from sdft.rng import Draws, generator
from sdft.types import Count, Fraction


@dataclass(frozen=True)
class Sample:
    """One captioned picture."""

    key: str
    picture: np.ndarray | Encoded
    """uint8 H x W x RGB, or as it is stored"""
    caption: str
    loss_weight: float = 1.0
    original_hw: tuple[int, int] | None = None
    """Size before the picture was reduced to these pixels, where that is known."""
    captions: Captions | None = None
    """What the caption of a visit is chosen from, where it is not always the same."""

    @property
    def image_HWC(self) -> np.ndarray:
        """uint8, RGB; a stored picture is read anew each time."""
        return self.picture.pixels() if isinstance(self.picture, Encoded) else self.picture


class Source(Protocol):
    """Captioned pictures by index. `keys` are stable names, known without reading a picture."""

    @property
    def keys(self) -> Sequence[str]: ...

    def __getitem__(self, index: int) -> Sample: ...


class RunOrder(Sampler[list[tuple[int, int]]]):
    """Batches of (index, visit) from batch number `start` to `stop`; rank r takes its slice of each global batch.

    buckets: name -> the indices whose pictures have one size; all `size` of them where there are none. Every
        optimiser step is of one bucket, whose samples come as one endless sequence of permutations: the tail of a
        pass is filled up from the next pass of the same bucket, so nothing is dropped and nobody is left behind.
    accumulate: batches of one optimiser step; only steps of several sizes depend on it.
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
    ):
        self.batch_size, self.seed, self.start, self.stop = batch_size, seed, start, stop
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.buckets = buckets or {"": range(size)}

    def __len__(self) -> int:
        return self.stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_batch = self.batch_size * self.world_size
        sizes = [len(indices) for indices in self.buckets.values()]
        streams = [Stream(indices, self.seed, name) for name, indices in self.buckets.items()]
        first_step, part = divmod(self.start, self.accumulate)
        turns = bucket_turns(sizes, per_batch * self.accumulate, self.seed, first_step)
        bucket, steps_before = next(turns)
        for _ in range(self.start, self.stop):
            if part == self.accumulate:
                part, (bucket, steps_before) = 0, next(turns)
            first = (steps_before * self.accumulate + part) * per_batch + self.rank * self.batch_size
            yield [streams[bucket][position] for position in range(first, first + self.batch_size)]
            part += 1


class Stream:
    """One endless sequence of (index, visit): a permutation of the indices after another."""

    def __init__(self, indices: Sequence[int], seed: int, name: str):
        self.indices, self.seed, self.name = indices, seed, name
        self._visit, self._order = -1, torch.empty(0)

    def __getitem__(self, position: int) -> tuple[int, int]:
        visit, place = divmod(position, len(self.indices))
        if visit != self._visit:
            order = generator(self.seed, "order", self.name, visit)
            self._visit, self._order = visit, torch.randperm(len(self.indices), generator=order)
        return self.indices[int(self._order[place])], visit


def bucket_turns(sizes: Sequence[int], num: int, seed: int, first: int) -> Iterator[tuple[int, int]]:
    """(bucket, how many steps it had before) of each step of `num` samples, from step `first` on.

    By the end of pass p over the data, a bucket of n samples has had the least number of steps that shows each of its
    samples p times: ceil(p n / num). The steps of a pass come in a random order of buckets.
    """
    done = [0] * len(sizes)
    visit = 0
    while True:
        due = [-(-(visit + 1) * size // num) for size in sizes]
        turns = [bucket for bucket, (a, b) in enumerate(zip(done, due, strict=True)) for _ in range(b - a)]
        if first >= len(turns):
            first, done = first - len(turns), due
        else:
            order = torch.randperm(len(turns), generator=generator(seed, "buckets", counter=visit)).tolist()
            for place, turn in enumerate(order):
                if place >= first:
                    yield turns[turn], done[turns[turn]]
                done[turns[turn]] += 1
            first = 0
        visit += 1


Variant = tuple[int, bool]
"""A sample and whether it is mirrored."""
States = tuple[Tensor, Tensor]
"""Text states of one caption: context L x D, pooled P."""


@runtime_checkable
class Expects(Protocol):
    """Something kept on disk that reads sooner what it was told of before."""

    def expect(self, names: Sequence[Any]) -> None: ...


class TextStates(Expects, Protocol):
    """The states of one text that all encoders are told, or of one for each."""

    def __call__(self, told: Sequence[str]) -> States: ...


@dataclass(frozen=True)
class Visit:
    """What is drawn for one visit of a sample; without draws it is as validation sees it.

    dropped, silent: whether all text encoders, and which of them, are told nothing.
    """

    index: int
    flip: bool
    draws: Draws | None = None
    dropped: bool = False
    silent: Sequence[bool] = ()

    def caption(self, sample: Sample) -> str:
        """The caption that this visit would learn."""
        return sample.captions.told(self.draws) if sample.captions and self.draws else sample.caption

    def told(self, sample: Sample) -> list[str]:
        """What the text encoders are told, all of them or each."""
        return ["" if self.dropped or nothing else self.caption(sample) for nothing in self.silent or (False,)]


class Pictures(Dataset):
    """Cuts and captions of a source.

    buckets: sizes (h, w); each picture is cut to the nearest shape of them, or all to `size_hw`.
    hw_N2: heights and widths of the pictures where they are known without reading them, 0 elsewhere.

    `moments` replaces the pixels once the VAE has seen a variant, and `text_states` the work of the text encoders.
    """

    def __init__(
        self,
        source: Source,
        size_hw: tuple[int, int],
        seed: int,
        crop: Crop = "center",
        flip: bool = False,
        caption_dropout: Fraction = 0.0,
        encoder_dropout: Sequence[Fraction] = (),
        buckets: Sequence[tuple[int, int]] = (),
        hw_N2: np.ndarray | None = None,
    ):
        self.source, self.size_hw, self.seed = source, size_hw, seed
        self.crop, self.flip = crop, flip
        self.caption_dropout, self.encoder_dropout = caption_dropout, encoder_dropout
        self.hw_N2 = np.zeros((len(source.keys), 2), np.int32) if hw_N2 is None else hw_N2
        self.targets = [nearest_bucket(self._hw(i), buckets) for i in range(len(source.keys))] if buckets else None
        self.moments: Mapping[Variant, Tensor] = {}
        self.text_states: TextStates | None = None

    def _hw(self, index: int) -> tuple[int, int]:
        h, w = self.hw_N2[index].tolist()
        return (h, w) if h else self.source[index].image_HWC.shape[:2]

    def target_hw(self, index: int) -> tuple[int, int]:
        """The size a sample is trained at."""
        return self.targets[index] if self.targets else self.size_hw

    def by_size(self, indices: Iterable[int] | None = None) -> dict[tuple[int, int], list[int]]:
        """The samples, or some of them, of each training size."""
        found = defaultdict(list)
        for index in range(len(self.source.keys)) if indices is None else indices:
            found[self.target_hw(index)].append(index)
        return dict(sorted(found.items()))

    def __getitem__(self, item: tuple[int, int]) -> dict:
        return self._example(self._visit(*item)) | {"visits": item[1]}

    def expect(self, items: Sequence[tuple[int, int]]) -> None:
        """Samples that will be read soon: what is kept of them on disk is fetched meanwhile."""
        if not isinstance(self.moments, Expects):
            return  # nothing is on disk, the text states neither
        visits = [self._visit(*item) for item in items]
        self.moments.expect([(visit.index, visit.flip) for visit in visits])
        if self.text_states is not None:
            self.text_states.expect([text for visit in visits for text in visit.told(self.source[visit.index])])

    def _visit(self, index: int, visit: int) -> Visit:
        draws = Draws(self.seed, [self.source.keys[index]], [visit])
        flip = self.flip and bool(draws.uniform("flip") < 0.5)
        dropped = bool(draws.uniform("caption dropout") < self.caption_dropout)
        shares = enumerate(self.encoder_dropout)
        silent = [bool(draws.uniform(f"caption dropout of encoder {place}") < share) for place, share in shares]
        return Visit(index, flip, draws, dropped, silent)

    def variant(self, index: int, flip: bool) -> dict:
        """One sample with its plain caption and the crop of validation."""
        return self._example(Visit(index, flip))

    def _example(self, visit: Visit) -> dict:
        """One sample as it is cut, with pixels or, where they are known, moments."""
        index, sample = visit.index, self.source[visit.index]
        moments = self.moments.get((index, visit.flip))
        h, w = self.hw_N2[index].tolist()
        image = sample.image_HWC if moments is None or not h else None
        cut = self.cut(index, (h, w) if image is None else image.shape[:2], visit.flip, visit.draws)
        original_cut = replace(cut, original_hw=sample.original_hw) if sample.original_hw else cut
        example = {
            "keys": sample.key,
            "visits": 0,
            "captions": visit.caption(sample),
            "dropped_B": visit.dropped,
            "time_ids_B6": torch.tensor(original_cut.time_ids_6, dtype=torch.float32),
            "loss_weight_B": sample.loss_weight,
        }
        if visit.silent:
            example["dropped_BE"] = torch.tensor(visit.silent)
        if self.text_states is not None:
            example["context_BLD"], example["pooled_BP"] = self.text_states(visit.told(sample))
        if moments is not None:
            return example | {"moments_BCHW": moments}
        assert image is not None
        return example | {"pixels_BCHW": cut_image(image, cut)}

    def cut(self, index: int, hw: tuple[int, int], flip: bool, draws: Draws | None = None) -> Cut:
        """How a picture of the size `hw` is cut on a visit."""
        at = (0.5, 0.5)
        if self.crop == "random" and draws is not None:
            at = (float(draws.uniform("crop top")), float(draws.uniform("crop left")))
        return plan_cut(hw, self.target_hw(index), at, flip)

    def cacheable_variants(self) -> Iterator[Variant]:
        """Every (index, flip) the run can ask for; an error where there is no such finite list."""
        if self.crop == "random":
            raise UserError("data.cache keeps one cut a picture: set data.crop=center, or data.cache=off")
        return ((i, flip) for i in range(len(self.source.keys)) for flip in ((False, True) if self.flip else (False,)))


def collate(examples: Sequence[dict]) -> Batch:
    """Examples of one size as a batch."""
    columns: dict[str, Any] = {name: [example[name] for example in examples] for name in examples[0]}
    for name, values in columns.items():
        if name.split("_")[-1].startswith("B"):
            columns[name] = torch.stack([torch.as_tensor(value) for value in values])
    columns["loss_weight_B"] = columns["loss_weight_B"].float()
    return Batch(**columns)


def batches(pictures: Pictures, indices: Sequence[int], batch_size: Count) -> Iterator[Batch]:
    """Consecutive batches of the unflipped, undropped samples: for validation and for filling a cache."""
    for first in range(0, len(indices), batch_size):
        yield collate([pictures.variant(index, flip=False) for index in indices[first : first + batch_size]])
