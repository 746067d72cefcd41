"""The LightningDataModule of pairs of pictures, for `objective=preference`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Literal

import numpy as np

from sdft.data.augmentation import Augmentation
from sdft.data.datamodule import Images, images_from
from sdft.data.dataset import ImageDataset
from sdft.data.exclusions import without
from sdft.data.images import Crop
from sdft.data.inventory import Inventory
from sdft.data.pairs import PairDataset, with_keys
from sdft.data.scan import OnUnreadable, Scan, only_readable
from sdft.data.scan_cache import ScanCache
from sdft.data.source import left_out
from sdft.data.sources.pairs import PairFolder, PairSource, Votes
from sdft.types import BatchSize, Count, Fraction, NumWorkers, Seed, Side


class Pairs(Images):
    """Pairs of pictures for training; of the held-out ones, validation reads the preferred picture.

    train, validation: sources of pairs. exclude: as in `Images`; the name of a pair is the key of its preferred picture
        and its rejected one. unreadable: with `skip`, a pair is omitted if one of its pictures cannot be decoded.

    The others are those of `Images`, which has more: masks, shards and several sizes are not for pairs. Whatever is
    random is the same for both pictures of a pair, and both have the size of the preferred one.
    """

    train_set: PairDataset

    def __init__(
        self,
        train: PairSource,
        validation: PairSource,
        batch_size: BatchSize,
        size: Side,
        seed: Seed = 0,
        crop: Crop = "center",
        flip: bool = False,
        caption_dropout: Fraction = 0.0,
        cache: Literal["ram", "disk", "off"] = "ram",
        num_workers: NumWorkers | Literal["auto"] = 0,
        bucket_step: Side | None = None,
        cache_dir: str | None = None,
        unreadable: OnUnreadable = "error",
        encoder_dropout: tuple[Fraction, Fraction] | None = None,
        exclude: str | None = None,
        augmentation: Augmentation | None = None,
        variants: Count | None = None,
        no_upscale: bool = False,
    ):
        chosen, held_out = (train, validation) if exclude is None else without([train, validation], exclude)
        rejected, _ = with_keys(train.rejected, chosen.keys)
        ((rejected, scan),), broken = only_readable([rejected], unreadable, ScanCache(cache_dir))
        chosen, _ = with_keys(chosen, rejected.keys)
        super().__init__(
            chosen, held_out, batch_size, size, seed, crop, flip, caption_dropout, cache, num_workers, bucket_step,
            cache_dir, unreadable, encoder_dropout, augmentation=augmentation, variants=variants, no_upscale=no_upscale,
        )  # fmt: skip
        self.left_out = list(dict.fromkeys([*left_out(train), *left_out(validation), *self.left_out]))
        self.skipped = [*self.skipped, *broken]
        rejected, places = with_keys(rejected, self.train_set.source.keys)
        self.rejected_scan = scan.subset(places)
        self.train_set = PairDataset(self.train_set, rejected, self.rejected_scan.hw_N2)

    def parts(self) -> Iterator[tuple[ImageDataset, Scan]]:
        yield from super().parts()
        yield self.train_set.rejected, self.rejected_scan

    @cached_property
    def _inventory(self) -> Inventory:
        both = [
            Inventory.of(dataset.source, scan)
            for dataset, scan in ((self.train_set, self.train_scan), (self.train_set.rejected, self.rejected_scan))
        ]
        # Not the sum: it would be the same after the two pictures have changed places.
        return Inventory(both[0].keys, both[0].digests_N * np.uint64(3) + both[1].digests_N)


folder, votes = images_from(PairFolder, Pairs), images_from(Votes, Pairs)
