"""Feeds Lightning: the training sequence, a fixed validation set, latents encoded once.

Knows batch sizes, workers and ranks; the samples themselves come from `dataset`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from sdft.data.dataset import Pictures, RunOrder, Source, collate
from sdft.data.images import Crop
from sdft.data.sources import Folder
from sdft.types import Batch, Count, Fraction, Index, UserError


class Images(L.LightningDataModule):
    """Captioned pictures for training and validation.

    train, validation: the sources; `validation` is never trained on.
    batch_size: samples of one device and one accumulation step.
    size: side of the square training images, in pixels.
    crop, flip: where the picture is cut, and whether half of the visits see it mirrored.
    caption_dropout: share of the visits that learn the empty prompt instead of the caption.
    cache: `ram` encodes each picture once and keeps the posterior's mean and log variance; `off` encodes every time.
    num_workers: processes that read pictures; 0 reads them in the training process.
    """

    def __init__(
        self,
        train: Source,
        validation: Source,
        batch_size: Count,
        size: Count,
        seed: int = 0,
        crop: Crop = "center",
        flip: bool = False,
        caption_dropout: Fraction = 0.0,
        cache: Literal["ram", "off"] = "ram",
        num_workers: Index = 0,
    ):
        super().__init__()
        if size % 16:
            nearest = max(64, round(size / 64) * 64)
            raise UserError(f"size={size}: must be a multiple of 16, and of 64 for SDXL; try size={nearest}")
        self.pictures = Pictures(train, (size, size), seed, crop, flip, caption_dropout)
        self.held_out = Pictures(validation, (size, size), seed)
        if cache == "ram":
            self.pictures.cacheable_variants()
        self.batch_size, self.seed, self.cache, self.num_workers = batch_size, seed, cache, num_workers
        self._batches_done = 0

    def train_dataloader(self) -> DataLoader:
        """The rest of the run's one sequence of batches; its length counts from the start of the run."""
        trainer = self.trainer
        num_batches = trainer.max_steps * trainer.accumulate_grad_batches
        order = RunOrder(
            len(self.pictures.source.keys),
            self.batch_size,
            self.seed,
            start=self._batches_done,
            stop=num_batches,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        return DataLoader(
            self.pictures,
            batch_sampler=order,
            collate_fn=collate,
            num_workers=self.num_workers,
            persistent_workers=False,
        )

    def val_dataloader(self) -> DataLoader:
        """Each held-out sample once, unflipped, with its caption."""
        positions = [(index, 0) for index in range(len(self.held_out.source.keys))]
        groups = [positions[i : i + self.batch_size] for i in range(0, len(positions), self.batch_size)]
        return DataLoader(self.held_out, batch_sampler=groups, collate_fn=collate)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def encode_once(self, encode: Callable[[Tensor], Tensor], device: torch.device, batch_size: int = 64) -> None:
        """Replace the pixels of every sample by the moments that `encode` gives for them."""
        for pictures in (self.pictures, self.held_out):
            variants = pictures.cacheable_variants()
            moments: dict[tuple[int, bool], Tensor] = {}
            starts = range(0, len(variants), batch_size)
            for start in tqdm(starts, desc="encoding images", unit="batch", disable=len(variants) < 512, leave=False):
                group = variants[start : start + batch_size]
                batch = collate([pictures.variant(index, flip) for index, flip in group])
                moments.update(zip(group, encode(batch.pixels_BCHW.to(device)).cpu(), strict=True))
            pictures.moments = moments

    def state_dict(self) -> dict[str, Any]:
        return {"batches_done": self.trainer.global_step * self.trainer.accumulate_grad_batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches_done = state["batches_done"]


def folder(
    root: str,
    batch_size: Count,
    size: Count,
    seed: int = 0,
    caption: str = "{caption}",
    default_caption: str | None = None,
    held_out: Fraction = 0.1,
    crop: Crop = "center",
    flip: bool = False,
    caption_dropout: Fraction = 0.0,
    cache: Literal["ram", "off"] = "ram",
    num_workers: Index = 0,
) -> Images:
    """The captioned pictures of one folder; see `sources.Folder` and `Images` for the options."""
    options = {"held_out": held_out, "caption": caption, "default_caption": default_caption}
    train, validation = (Folder(root, split, **options) for split in ("train", "validation"))
    return Images(train, validation, batch_size, size, seed, crop, flip, caption_dropout, cache, num_workers)
