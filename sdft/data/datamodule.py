"""The LightningDataModule: training batches in a resumable order, a fixed validation set, and encoding once.

Knows batch sizes, workers and ranks; examples come from `dataset`, cached encodings from `encoding`.
"""

from __future__ import annotations

import inspect
import os
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sdft.batch import Batch
from sdft.data.augmentation import Augmentation
from sdft.data.buckets import bucket_sizes, check_sizes
from sdft.data.cache import Cache, fingerprint
from sdft.data.dataset import ImageDataset, collate
from sdft.data.encoding import Ranks, all_captions, cached_embeddings, cached_moments, moments_maker
from sdft.data.exclusions import without
from sdft.data.images import Crop
from sdft.data.inventory import Inventory
from sdft.data.masks import Masks, check_masks
from sdft.data.order import BatchOrder, PrefetchOrder, chunks, shard_windows
from sdft.data.packed_strings import unique
from sdft.data.scan import OnUnreadable, Scan, only_readable
from sdft.data.scan_cache import ScanCache
from sdft.data.sizes import SizeOrder, SizeSchedule, sizes_of
from sdft.data.source import Source, left_out, stored_image
from sdft.data.sources import Folder, HuggingFace, Shards
from sdft.data.sources.beside import OWN, beside
from sdft.errors import UserError
from sdft.types import BatchSize, Count, Fraction, NumWorkers, Positive, Seed, Side

MOST_WORKERS = 8
"""Of `num_workers=auto`; more seldom decode faster than a GPU trains."""


class Images(L.LightningDataModule):
    """Captioned images for training and validation.

    train, validation: the sources; `validation` is never trained on.
    batch_size: samples of one device and one accumulation step.
    size: side of the square training images, in pixels; with buckets, the root of their area.
    crop, flip: position of the crop, and whether half of the visits are flipped horizontally, but for images whose
        caption says left or right.
    caption_dropout: probability of training on the empty prompt instead of the caption.
    encoder_dropout: probabilities of the empty prompt for the first (CLIP-L) and second text encoder (CLIP-G), drawn
        independently of each other and of `caption_dropout`; None for the same prompt for both.
    cache: `ram` encodes each image once per run and stores the mean and log variance of the posterior; `disk` stores
        them in `cache_dir` for later runs, and the prompt embeddings too if no text encoder trains; `off` encodes at
        every visit.
    num_workers: processes that read images; 0 reads them in the training process. `auto` takes one for each core that
        this process may use beyond its own, at most 8, if images are decoded at every visit, and 0 if they are cached.
    bucket_step: images keep their aspect ratio, in buckets of about `size`^2 pixels whose sides are multiples of this;
        None crops squares. no_upscale: smaller images are trained at sizes of their own instead of being enlarged, and
        with `sizes` only at the sides that they cover.
    sizes: sides in pixels -> relative shares of the optimizer steps; every image is trained at each, and `size` is that
        of validation. size_schedule: `together`, which is the default, mixes them over the run; `ascending` trains one
        after another.
    cache_dir: folder of `cache=disk`, which any number of runs can share, and of the results of scans, which are in the
        user's cache folder if it is None.
    augmentation: random zoom, rotation and colours of training images. variants: number of random crops, zooms,
        rotations and colours of each image, so that they can be cached; others at every visit if it is None.
    masks: weight the loss of training images by their masks (`objective.outside`), which are in files beside them, or
        with `alpha` in their alpha channels; an image without one counts whole.
    exclude: a text file with the keys of images to leave out, one a line.
    shuffle_shards: reads a set of shards this many at a time, shuffled together, instead of all in one random order,
        for sets that are larger than `cache_limit_gb`.
    class_images: a source of which a pass reads as many images as of `train`, those of the smaller one repeatedly.
    unreadable: with `error`, images that cannot be decoded end the run before training, all named; `skip` omits them.

    Raises UserError for sizes that the latents cannot have, for a disk cache without folder, and for unreadable images.
    """

    def __init__(
        self,
        train: Source,
        validation: Source,
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
        shuffle_shards: Count | None = None,
        exclude: str | None = None,
        augmentation: Augmentation | None = None,
        variants: Count | None = None,
        masks: Masks = False,
        no_upscale: bool = False,
        sizes: dict[Side, Positive] | None = None,
        size_schedule: SizeSchedule | None = None,
        class_images: Source | None = None,
    ):
        super().__init__()
        check_sizes(size, bucket_step)
        self.sizes = sizes_of(sizes, size_schedule, bucket_step)
        if cache == "disk" and cache_dir is None:
            raise UserError("data.cache=disk: set data.cache_dir=DIR, the folder of the cache")
        self.left_out = list(dict.fromkeys(line for part in (train, validation) for line in left_out(part)))
        if exclude is not None:
            train, validation = without([train, validation], exclude)
        self.own_per_pass = 1
        """How often a pass reads each image of `train`."""
        if class_images is not None:
            train = beside(train, class_images, shuffle_shards)
            self.own_per_pass = train.repeats[OWN]
        ((train, scan), (validation, validation_scan)), self.skipped = only_readable(
            [train, validation], unreadable, ScanCache(cache_dir)
        )
        if no_upscale and not bucket_step and self.sizes is None:
            raise UserError("data.no_upscale=true: small images need sizes of their own; set data.bucket_step=64")
        buckets = bucket_sizes(size, bucket_step) if bucket_step else ()
        step_below = bucket_step if no_upscale else None
        dataset_of = partial(ImageDataset, size_hw=(size, size), seed=seed, buckets=buckets, step_below=step_below)
        self.train_set = dataset_of(
            train, crop=crop, flip=flip, caption_dropout=caption_dropout, encoder_dropout=encoder_dropout or (),
            hw_N2=scan.hw_N2, augmentation=augmentation, variants=variants, masks=masks,
            sides=self.sizes.buckets(bucket_step) if self.sizes else (), enlarge=not no_upscale,
        )  # fmt: skip
        self.validation_set = dataset_of(validation, hw_N2=validation_scan.hw_N2)
        self.train_scan, self.validation_scan = scan, validation_scan
        if cache != "off":
            self.train_set.cacheable_variants()
        # Generated images are not asked: each would be drawn only to read its caption.
        asked = (index for index in range(len(train.keys)) if flip and stored_image(train, index) is not None)
        if fixed := sum(map(self.train_set.names_direction, asked)):
            self.left_out.append(f"{fixed} x not flipped: the caption says left or right")
        if self.sizes:
            self.left_out += self.sizes.too_small(self.train_set.items, len(train.keys))
        if masks:
            self.num_masked = check_masks(train, scan, masks)
        self.batch_size, self.seed, self.cache, self.num_workers = batch_size, seed, cache, num_workers
        self.store = Cache(cache_dir) if cache == "disk" and cache_dir else None
        self.bucketed = bool(bucket_step or self.sizes)
        self.resume_with_changed_data = False
        """Whether a run may go on with other images than its checkpoint was saved with."""
        self.windows = shard_windows(train, shuffle_shards, seed, cache != "off", self.train_set.items.sample_of)
        self._batches_done = 0

    def train_dataloader(self) -> DataLoader:
        """The remaining batches of the run; the length counts from the start of the run."""
        trainer, num_workers = self.trainer, self.num_workers
        if num_workers == "auto":
            num_workers = useful_workers(self.cache == "off", trainer.num_devices)
        num_batches = trainer.max_steps * trainer.accumulate_grad_batches
        sizes = self.train_set.by_size() if self.bucketed else {}
        side_of = [self.train_set.items.side_of[indices[0]] for indices in sizes.values()]
        order = BatchOrder(
            len(self.train_set.source.keys),
            self.batch_size,
            self.seed,
            start=self._batches_done,
            stop=num_batches,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
            buckets={f"{h}x{w}": indices for (h, w), indices in sizes.items()},
            windows=self.windows,
            order=SizeOrder(self.sizes, side_of, trainer.max_steps) if self.sizes else None,
        )
        return DataLoader(
            self.train_set,
            batch_sampler=PrefetchOrder(order, self.train_set.prefetch, self.train_set.prefetch_files),
            collate_fn=collate,
            num_workers=num_workers,
            persistent_workers=False,
        )

    def val_dataloader(self) -> DataLoader:
        """Each validation sample once, unflipped, with its caption."""
        sizes = self.validation_set.by_size().values()
        groups = [[(index, 0) for index in group] for indices in sizes for group in chunks(indices, self.batch_size)]
        return DataLoader(self.validation_set, batch_sampler=groups, collate_fn=collate)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def parts(self) -> Iterator[tuple[ImageDataset, Scan]]:
        """Each dataset whose images the run reads, with the scan of its source."""
        yield self.train_set, self.train_scan
        yield self.validation_set, self.validation_scan

    def encode_once(
        self,
        encode: Callable[[Tensor], Tensor],
        device: torch.device,
        batch_size: int = 64,
        vae: nn.Module | None = None,
    ) -> None:
        """Encode all images and replace their pixels by moments.

        encode: pixels B x C x H x W -> moments B x 2C x h x w. With `cache=disk`, moments are looked up by image, crop
        and weights of `vae`, and only missing ones are encoded.
        """
        encoder = fingerprint(vae) if self.store is not None and vae is not None else None
        for dataset, scan in self.parts():
            make = moments_maker(dataset, encode, device, batch_size)
            if self.store is not None and encoder is not None:
                cached = cached_moments(self.store, encoder, dataset, scan, make, self._ranks())
                dataset.moments = dataset.moments_on_disk = cached
            else:
                dataset.moments = dict(make(list(dataset.cacheable_variants())))

    def encode_texts_once(
        self, encode: Callable[[Sequence[str]], tuple[Tensor, Tensor]], ids: Callable[[str], Any], *encoders: nn.Module
    ) -> bool:
        """Encode all captions with `cache=disk`, if they can be listed; returns whether that is so.

        encode: captions -> context B x L x D and pooled B x P. ids: token ids of a caption.
        """
        if self.store is None:
            return False
        captions = all_captions((self.train_set.source, self.validation_set.source))
        if captions is None:
            return False
        embeddings = cached_embeddings(self.store, unique(captions), encode, ids, encoders, self._ranks())
        self.train_set.text_embeddings = self.validation_set.text_embeddings = embeddings
        return True

    def _ranks(self) -> Ranks:
        if self.trainer is None:
            return Ranks()
        return Ranks(self.trainer.global_rank, self.trainer.world_size, self.trainer.strategy.barrier)

    def state_dict(self) -> dict[str, Any]:
        return {
            "batches_done": self.trainer.global_step * self.trainer.accumulate_grad_batches,
            "samples_per_step": self._samples_per_step(),
            "inventory": self._inventory.state(),
            "sizes": self.sizes and str(self.sizes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint was saved. Raises UserError if the images or the effective batch are others, unless
        `resume_with_changed_data` is set, which goes on at the same step with what is there now."""
        self._batches_done = state["batches_done"]
        changes = []
        if "inventory" in state:  # checkpoints of earlier versions have none
            changes = self._inventory.changes_since(Inventory.from_state(state["inventory"]))
        per_step = self._samples_per_step()
        if state.get("samples_per_step", per_step) != per_step:
            changes.append(f"{per_step} images a step instead of {state['samples_per_step']}")
        if state.get("sizes") != (sizes := self.sizes and str(self.sizes)):
            changes.append(f"{sizes or 'none'} as data.sizes instead of {state.get('sizes') or 'none'}")
        if changes and not self.resume_with_changed_data:
            raise UserError(
                f"resume: the checkpoint was saved with other data: {', '.join(changes)}; restore them, or set "
                "resume_with_changed_data=true to go on with what is there now"
            )
        if changes and self.trainer.is_global_zero:
            print(f"the data have changed since the checkpoint: {', '.join(changes)}", flush=True)

    def _samples_per_step(self) -> int:
        return self.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches

    @cached_property
    def _inventory(self) -> Inventory:
        return Inventory.of(self.train_set.source, self.train_scan, self.train_set.masks)


def images_from(source: type, module: type | None = None) -> Callable[..., Any]:
    """A constructor of `Images`, or another `module`, from two splits of one `source` class; it takes the arguments of
    both."""
    made = module or Images
    both: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    taken = {}
    for owner, given in ((source, {"split", "loss_weight"}), (made, {"train", "validation"})):
        parameters = inspect.signature(owner).parameters
        taken[owner] = [name for name in parameters if name not in given]
        both |= {name: parameters[name] for name in taken[owner]}
        hints |= typing.get_type_hints(owner.__init__, include_extras=True)  # type: ignore[misc]
    ordered = sorted(both.values(), key=lambda parameter: parameter.default is not parameter.empty)

    def build(*args: Any, **kwargs: Any) -> Any:
        options = signature.bind(*args, **kwargs).arguments
        own, images = ({k: v for k, v in options.items() if k in taken[owner]} for owner in (source, made))
        return made(source(split="train", **own), source(split="validation", **own), **images)

    signature = build.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    build.__annotations__ = {name: hints[name] for name in both}
    build.__name__ = source.__name__.lower()
    build.__doc__ = f"`{made.__name__}` from two splits of one `{source.__name__}`; takes the arguments of both."
    return build


folder, shards, huggingface = images_from(Folder), images_from(Shards), images_from(HuggingFace)


def useful_workers(decodes: bool, num_devices: int) -> int:
    """The number of `num_workers=auto` for each of the devices of this machine."""
    cores = len(os.sched_getaffinity(0)) // num_devices
    return min(max(cores - 1, 0), MOST_WORKERS) if decodes else 0
