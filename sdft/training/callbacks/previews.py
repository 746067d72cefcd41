"""Images of the same prompts and seeds during training, beside those of the base model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from PIL import Image

from sdft.board.previews import BASE, FOLDER, PROMPTS
from sdft.evaluation.image_grid import letterboxed, save_grid
from sdft.formats.output import atomic_output
from sdft.hardware import autocast_precision
from sdft.protocols import Tuning, strategy_hooks
from sdft.sampling.generate import generate
from sdft.sampling.samplers import Sampler
from sdft.training.callbacks.averaged import averaged_weights
from sdft.training.callbacks.preview_prompts import PreviewPrompt, read_prompts
from sdft.training.callbacks.tracking import log_picture
from sdft.types import Count, Precision


class Previews(L.Callback):
    """Draws `prompts` during training, with the averaged parameters if a callback keeps an average.

    In `previews/` of the run folder: `step_000200.png`, all images of a step below those of the base model;
    `step_000200/00.png` and `base/00.png`, single ones; `prompts.json`, what they show, in the order of their numbers.

    run_dir: the run folder.
    prompts: each a text, or a mapping: `prompt`, and where one image differs from the others, its `seed` (by default
        its number, from 0), `size` (side or [height, width]), `sampler` (a name, or settings of the run's sampler),
        `steps`, `cfg`, `negative`, `rescale`, `strength` (of what is trained: 0 is the base model) and `loras` (files
        or run folders and their strengths, applied together with what is trained, for this image).
    every: optimizer steps between two previews.
    size: side of the images, in pixels.

    Raises UserError for prompts that cannot be drawn, before the weights are read or, where it depends on the model,
    before the first step.
    """

    def __init__(
        self,
        run_dir: str,
        prompts: Sequence[str | Mapping[str, Any]],
        sampler: Sampler,
        size: Count,
        every: Count = 200,
    ):
        self.folder, self.every = Path(run_dir) / FOLDER, every
        self.prompts = read_prompts(prompts, sampler, (size, size))
        self._base: list[np.ndarray] | None = None
        self._last = 0

    def check_tuning(self, tuning: Tuning) -> None:
        for prompt in self.prompts:
            if prompt.strength not in (0, 1):
                tuning.refuse_strength(f"{prompt.key}.strength={prompt.strength:g}")

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        num_shards = strategy_hooks(trainer.strategy).num_shards(trainer.world_size)
        for prompt in self.prompts:
            prompt.check(module, num_shards)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._last = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._last or step % self.every or step == trainer.max_steps:
            return
        self._last = step
        # Sharded weights are gathered only if all ranks compute.
        if trainer.is_global_zero or strategy_hooks(trainer.strategy).num_shards(trainer.world_size) > 1:
            self._draw(trainer, module, step)

    def _draw(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        precision = autocast_precision(trainer.precision)
        if self._base is None:
            self._base = self._base_pictures(trainer, module, precision)
        with averaged_weights(trainer, module):
            now = self._pictures(module, precision, self.prompts, trained=True)
        if not trainer.is_global_zero:
            return
        path = self.folder / f"step_{step:06d}.png"
        for number, picture in enumerate(now):
            save_png(self.folder / path.stem / name_of(number), picture)
        hw = (max(len(picture) for picture in now), max(picture.shape[1] for picture in now))
        rows = [letterboxed(pictures, hw) for pictures in (self._base, now)]
        save_grid(path, rows, ["base", f"step {step}"], [prompt.label for prompt in self.prompts])
        log_picture(trainer, "previews", path, step)

    def _base_pictures(self, trainer: L.Trainer, module: L.LightningModule, precision: Precision) -> list[np.ndarray]:
        """Those of the base model. Of a run that goes on in its folder, those that are there are not drawn again."""
        wanted = [prompt.described(name_of(number)) for number, prompt in enumerate(self.prompts)]
        resumed = trainer.ckpt_path
        goes_on = resumed is not None and Path(resumed).resolve().is_relative_to(self.folder.parent.resolve())
        kept: list[np.ndarray | None] = self._on_disk(wanted) if goes_on else [None] * len(wanted)
        # All ranks of a sharded model draw, and must draw the same.
        if strategy_hooks(trainer.strategy).num_shards(trainer.world_size) > 1:
            kept = trainer.strategy.broadcast(kept, src=0)
        missing = [number for number, picture in enumerate(kept) if picture is None]
        drawn = self._pictures(module, precision, [self.prompts[number] for number in missing], trained=False)
        for number, picture in zip(missing, drawn, strict=True):
            kept[number] = picture
        if trainer.is_global_zero:
            # One that shows something else is gone before the file says what they show.
            for number in missing:
                (self.folder / BASE / name_of(number)).unlink(missing_ok=True)
            with atomic_output(self.folder / PROMPTS, overwrite=True) as path:
                path.write_text(json.dumps(wanted, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            for number, picture in zip(missing, drawn, strict=True):
                save_png(self.folder / BASE / name_of(number), picture)
        return [picture for picture in kept if picture is not None]

    def _on_disk(self, wanted: Sequence[Mapping[str, Any]]) -> list[np.ndarray | None]:
        """For each entry of `prompts.json`, the base picture on the disk, or None if it shows something else."""
        found: list[np.ndarray | None] = [None] * len(wanted)
        there: list[Any] = []
        with suppress(OSError, ValueError):
            there = [*json.loads((self.folder / PROMPTS).read_text(encoding="utf-8"))]
        for number, (entry, before) in enumerate(zip(wanted, there, strict=False)):
            if entry != before:
                continue
            with suppress(OSError), Image.open(self.folder / BASE / name_of(number)) as image:
                picture = np.asarray(image.convert("RGB"))
                found[number] = picture if list(picture.shape[:2]) == entry["size"] else None
        return found

    def _pictures(
        self, module: L.LightningModule, precision: Precision, prompts: Sequence[PreviewPrompt], trained: bool
    ) -> list[np.ndarray]:
        """The image of each prompt; those with the same settings are drawn together."""
        alike: dict[tuple[Any, ...], list[int]] = {}
        for place, prompt in enumerate(prompts):
            alike.setdefault(prompt.alike(), []).append(place)
        pictures: dict[int, np.ndarray] = {}
        for places in alike.values():
            same = [prompts[place] for place in places]
            first, texts, seeds = same[0], [prompt.prompt for prompt in same], [prompt.seed for prompt in same]
            with first.applied(module.model, module.tuning, trained):
                drawn = generate(module.model, texts, seeds, first.sampler, first.size_hw, precision)
            pictures.update(zip(places, drawn, strict=True))
        return [pictures[place] for place in range(len(prompts))]


def name_of(number: int) -> str:
    """The file of the image of a prompt, counted from 0."""
    return f"{number:02d}.png"


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write an image, whole or not at all."""
    with atomic_output(path, overwrite=True) as written:
        Image.fromarray(picture).save(written)
