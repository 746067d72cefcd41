"""The map-style dataset of a run: examples of the samples of a source, by index and visit.

Everything random about an example is a function of (run seed, key, visit).

An item is what a pass over the data has once: a sample, or where a run has several sides, a sample at one of them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sdft.batch import Batch
from sdft.data.augmentation import Augmentation, Colours, Geometry
from sdft.data.buckets import covered_bucket, nearest_bucket
from sdft.data.images import Crop, CropPlan, crop_image, crop_mask, plan_crop
from sdft.data.masks import Masks, mask_of
from sdft.data.sizes import Items, items_of
from sdft.data.source import Sample, Source, prefetch
from sdft.errors import UserError
from sdft.rng import Draws
from sdft.types import Count, Fraction

Variant = tuple[int, bool, int]
"""(index of an item, whether it is flipped, number of its crop and colours)"""
DIRECTION = re.compile(r"\b(left|right)(most|wards?|-handed|-facing)?\b", re.IGNORECASE)
"""Words of a caption that a flip would make untrue."""
Embeddings = tuple[Tensor, Tensor]
"""Prompt embeddings of one caption: context L x D, pooled P."""


class Prefetches(Protocol):
    """Something stored on disk that is read faster if announced."""

    def prefetch(self, names: Sequence[Any]) -> None:
        """Start reading entries that will be needed soon."""


class EmbeddingLookup(Prefetches, Protocol):
    """Prompt embeddings by the captions of the text encoders: one for all, or one for each."""

    def __call__(self, captions: Sequence[str]) -> Embeddings: ...


@dataclass(frozen=True)
class Visit:
    """The random choices of one reading of a sample; the defaults are those of validation.

    index: of the item. number: of the crop and colours; 0 where there is one. draws: of the captions. looks: of the
    crop and colours. dropped: whether the caption is replaced by the empty one. dropped_encoders: the same for each
    text encoder.
    """

    index: int
    flip: bool
    number: int = 0
    draws: Draws | None = None
    looks: Draws | None = None
    dropped: bool = False
    dropped_encoders: Sequence[bool] = ()

    def caption(self, sample: Sample) -> str:
        """The caption of this visit, before dropout."""
        return sample.captions.draw(self.draws) if sample.captions and self.draws else sample.caption

    def encoder_captions(self, sample: Sample) -> list[str]:
        """The caption of all text encoders, or of each, after dropout."""
        return ["" if self.dropped or alone else self.caption(sample) for alone in self.dropped_encoders or (False,)]


class ImageDataset(Dataset):
    """Cropped, captioned training examples of a source.

    size_hw: size in pixels to which images are resized and cropped, without buckets.
    buckets: sizes (h, w); each image is cropped to the one with the nearest aspect ratio. step_below: images that are
        smaller get sizes of their own, in multiples of this; None enlarges them.
    sides: the buckets of each side of a run that has several, instead of `buckets`. enlarge: whether an image is also
        trained at a side that it does not cover.
    caption_dropout: share of visits with the empty caption. encoder_dropout: the same for each text encoder, besides.
    hw_N2: heights and widths of the images that are known without reading them, 0 for others.
    augmentation: changes of the images. variants: number of crops and colours of each image, in turn at its visits, so
        that they can be encoded once; None for others at every visit. masks: see `sdft.data.masks`.

    Visits count how often an item was read. Where there are several sides, those of a sample are numbered in turn
    (visit v at side k of n is number v n + k), so that no noise, timestep or caption of a sample comes again at another
    side.

    Examples have pixels and captions. Once they are set, `moments` (of the VAE's posterior, by variant) replace the
    pixels, and `text_embeddings` the captions. `moments_on_disk` is set as well if `moments` reads the disk cache.
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
        step_below: int | None = None,
        hw_N2: np.ndarray | None = None,
        augmentation: Augmentation | None = None,
        variants: Count | None = None,
        masks: Masks = False,
        sides: Sequence[Sequence[tuple[int, int]]] = (),
        enlarge: bool = True,
    ):
        self.masks = masks
        self.source, self.size_hw, self.seed = source, size_hw, seed
        self.crop, self.flip, self.augmentation, self.variants = crop, flip, augmentation or Augmentation(), variants
        self.caption_dropout, self.encoder_dropout = caption_dropout, encoder_dropout
        self.hw_N2 = np.zeros((len(source.keys), 2), np.int32) if hw_N2 is None else hw_N2
        choose = nearest_bucket if step_below is None else partial(covered_bucket, step=step_below)
        num = len(source.keys)
        self.items = items_of(map(self._hw, range(num)), sides, enlarge) if sides else Items(range(num), bytes(num))
        self.num_sides, self.targets = len(sides) or 1, self.items.targets
        if buckets and not sides:
            self.targets = [choose(self._hw(i), buckets) for i in range(num)]
        self.moments: Mapping[Variant, Tensor] = {}
        self.moments_on_disk: Prefetches | None = None
        self.text_embeddings: EmbeddingLookup | None = None

    def _hw(self, index: int) -> tuple[int, int]:
        h, w = self.hw_N2[index].tolist()
        return (h, w) if h else self.source[index].image_HWC.shape[:2]

    def target_hw(self, index: int) -> tuple[int, int]:
        """The training size of an item, in pixels."""
        return self.targets[index] if self.targets else self.size_hw

    def by_size(self, indices: Iterable[int] | None = None) -> dict[tuple[int, int], list[int]]:
        """Training size -> indices of its items, among `indices` if given."""
        found = defaultdict(list)
        for index in range(len(self.items.sample_of)) if indices is None else indices:
            found[self.target_hw(index)].append(index)
        return dict(sorted(found.items()))

    def items_of_samples(self) -> list[list[int]]:
        """The items of each sample."""
        found: list[list[int]] = [[] for _ in self.source.keys]
        for item, place in enumerate(self.items.sample_of):
            found[place].append(item)
        return found

    def __getitem__(self, item: tuple[int, int]) -> dict:
        return self._example(self._visit(*item)) | {"visits": self._number(*item)}

    def prefetch(self, items: Sequence[tuple[int, int]]) -> None:
        """Start reading what the disk cache has of items that will be needed soon."""
        if self.moments_on_disk is None:
            return  # no disk cache, so no text embeddings there either
        visits = [self._visit(*item) for item in items]
        self.moments_on_disk.prefetch([(visit.index, visit.flip, visit.number) for visit in visits])
        if self.text_embeddings is not None:
            captions = (visit.encoder_captions(self._sample(visit.index)) for visit in visits)
            self.text_embeddings.prefetch([text for each in captions for text in each])

    def prefetch_files(self, items: Sequence[tuple[int, int]]) -> None:
        """Start fetching the files of samples that will be needed later, unless all images are encoded already."""
        if not self.moments:
            prefetch(self.source, [self.items.sample_of[index] for index, _ in items])

    def _sample(self, index: int) -> Sample:
        return self.source[self.items.sample_of[index]]

    def _number(self, index: int, visit: int) -> int:
        """The number of a visit among those of the sample at all sides."""
        return visit * self.num_sides + self.items.side_of[index]

    def _draws(self, index: int, visit: int) -> Draws:
        """The random numbers of a visit, or of one of the `variants` of an image."""
        return Draws(self.seed, [self.source.keys[self.items.sample_of[index]]], [self._number(index, visit)])

    def _visit(self, index: int, visit: int) -> Visit:
        draws = self._draws(index, visit)
        turned = self.flip and bool(draws.uniform("flip") < 0.5)
        flip = turned and not self.names_direction(self.items.sample_of[index], draws)
        number = visit % self.variants if self.variants else 0
        looks = self._draws(index, number) if self.variants else draws
        dropped = bool(draws.uniform("caption dropout") < self.caption_dropout)
        shares = enumerate(self.encoder_dropout)
        alone = [bool(draws.uniform(f"caption dropout of encoder {place}") < share) for place, share in shares]
        return Visit(index, flip, number, draws, looks, dropped, alone)

    def names_direction(self, place: int, draws: Draws | None = None) -> bool:
        """Whether the caption of a sample, of a visit or of validation, says left or right; such images are not
        flipped."""
        sample = self.source[place]
        caption = sample.captions.draw(draws) if sample.captions and draws else sample.caption
        return bool(DIRECTION.search(caption))

    def variant(self, index: int, flip: bool, number: int = 0) -> dict:
        """One item with the caption of validation, and its crop, or one of its `variants`."""
        return self._example(Visit(index, flip, number, looks=self._draws(index, number) if self.variants else None))

    def _example(self, visit: Visit) -> dict:
        """One example, with moments if they are cached and pixels otherwise."""
        index, place, sample = visit.index, self.items.sample_of[visit.index], self._sample(visit.index)
        moments = self.moments.get((index, visit.flip, visit.number))
        h, w = self.hw_N2[place].tolist()
        image = sample.image_HWC if moments is None or not h else None
        crop = self.crop_plan(index, (h, w) if image is None else image.shape[:2], visit.flip, visit.looks)
        conditioned = replace(crop, original_hw=sample.original_hw) if sample.original_hw else crop
        example = {
            "keys": sample.key,
            "visits": 0,
            "captions": visit.caption(sample),
            "dropped_B": visit.dropped,
            "time_ids_B6": torch.tensor(conditioned.time_ids_6, dtype=torch.float32),
            "loss_weight_B": sample.loss_weight,
        }
        if visit.dropped_encoders:
            example["dropped_BE"] = torch.tensor(visit.dropped_encoders)
        if self.text_embeddings is not None:
            example["context_BLD"], example["pooled_BP"] = self.text_embeddings(visit.encoder_captions(sample))
        if self.masks:
            mask = mask_of(self.source, place, self.masks)
            example["mask_B1HW"] = torch.ones(1, *crop.target_hw) if mask is None else crop_mask(mask, crop)
        if moments is not None:
            return example | {"moments_BCHW": moments}
        assert image is not None
        return example | {"pixels_BCHW": crop_image(image, crop, self.colours(visit.looks))}

    def crop_plan(self, index: int, hw: tuple[int, int], flip: bool, looks: Draws | None = None) -> CropPlan:
        """The crop of an item, whose image has the size `hw`; `looks` of a visit place a random crop, zoom and turn
        it."""
        at, geometry = (0.5, 0.5), Geometry()
        if looks is not None:
            geometry = self.augmentation.geometry(looks)
            if self.crop == "random":
                at = (float(looks.uniform("crop top")), float(looks.uniform("crop left")))
        return plan_crop(hw, self.target_hw(index), at, flip, geometry)

    def colours(self, looks: Draws | None) -> Colours:
        """The colours of a visit."""
        return Colours() if looks is None else self.augmentation.colours(looks)

    def plan_of(self, variant: Variant, hw: tuple[int, int]) -> tuple[CropPlan, Colours]:
        """Crop and colours of a variant whose image has the size `hw`."""
        index, flip, number = variant
        looks = self._draws(index, number) if self.variants else None
        return self.crop_plan(index, hw, flip, looks), self.colours(looks)

    def cacheable_variants(self) -> Iterator[Variant]:
        """Every variant that the run can read. Raises UserError if there is no finite list of them."""
        if self.variants is None and (self.crop == "random" or self.augmentation.changes):
            raise UserError(
                "data.cache stores a list of crops and colours of each image: set data.variants=N for N of them, "
                "data.cache=off for others at every visit, or data.crop=center and no data.augmentation"
            )
        indices, flips = range(len(self.items.sample_of)), (False, True) if self.flip else (False,)
        return ((index, flip, number) for index in indices for number in range(self.variants or 1) for flip in flips)


def collate(examples: Sequence[dict]) -> Batch:
    """A batch of examples of one size."""
    columns: dict[str, Any] = {name: [example[name] for example in examples] for name in examples[0]}
    for name, values in columns.items():
        if name.split("_")[-1].startswith("B"):
            columns[name] = torch.stack([torch.as_tensor(value) for value in values])
    columns["loss_weight_B"] = columns["loss_weight_B"].float()
    return Batch(**columns)


def batches(dataset: ImageDataset, indices: Sequence[int], batch_size: Count) -> Iterator[Batch]:
    """Consecutive batches of items as validation sees them."""
    for first in range(0, len(indices), batch_size):
        yield collate([dataset.variant(index, flip=False) for index in indices[first : first + batch_size]])
