"""The images of a comparison on disk, each named by a hash of everything that it depends on.

An image that exists is not generated again, so a comparison that was stopped continues. Several processes share the
work through the folder.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from PIL import Image

from sdft.distributed.processes import ProcessInfo
from sdft.errors import UserError
from sdft.evaluation.grid import GenerationSettings, GridCell
from sdft.evaluation.subject_loader import SubjectLoader
from sdft.progress import tqdm
from sdft.rng import seed_of
from sdft.sampling.generate import PromptEmbeddings, generate, refuse_size

VERSIONS = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")}
TIMEOUT_SECONDS = 1800
"""Seconds without a new image after which rank 0 stops waiting for the others."""


class ImageCache:
    """Generates the images of cells that are not on disk yet.

    folder: of the images. loader: loads the subjects. batch_size: images per batch.
    precision: of autocast, part of the file names.
    """

    def __init__(self, folder: Path, loader: SubjectLoader, precision: Literal["fp32", "bf16"], batch_size: int):
        self.folder, self.loader, self.precision, self.batch_size = folder, loader, precision, batch_size

    def path(self, cell: GridCell) -> Path:
        """Path of a cell's image, whether or not it exists.

        The hashed values must not change, or the images of earlier comparisons are generated again.
        """
        weights = self.loader.identity(cell.subject, cell.scale, cell.step, cell.width)
        content = [weights, asdict(cell.settings), self.precision, self.loader.device.type, VERSIONS]
        digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=12)
        return self.folder / f"{digest.hexdigest()}.png"

    def fill(self, cells: Sequence[GridCell], process: ProcessInfo = ProcessInfo()) -> None:
        """Generate what is missing; rank 0 returns when every image exists, the others after their own.

        Batches are formed from the whole grid, so a stopped comparison continues with the same batches and bits.
        """
        wanted = {self.path(cell): cell for cell in cells}
        missing = {path for path in wanted if not path.is_file()}
        with tqdm(total=len(missing), desc="generating", unit="image", disable=process.rank > 0 or not missing) as bar:
            self._generate(list(wanted.items()), process, bar.update)
            if process.rank == 0 and process.world_size > 1:
                self._wait(list(missing), bar)

    def _generate(self, wanted: list[tuple[Path, GridCell]], process: ProcessInfo, done: Callable[[int], Any]) -> None:
        for batches in self._own_batches(wanted, process):
            self._generate_with_one_model(batches, done)

    def _generate_with_one_model(self, batches: list[list], done: Callable[[int], Any]) -> None:
        """The images of one subject. The model is released with this call, before that of the next one is loaded."""
        _, first = batches[0][0]
        with self.loader.open(first.subject, first.scale, first.step, first.width) as model:
            texts = PromptEmbeddings(model)
            for batch in batches:
                settings = batch[0][1].settings
                refuse_size(model, settings.size_hw)
                images = generate(
                    model,
                    [cell.settings.prompt for _, cell in batch],
                    [noise_seed(cell.settings) for _, cell in batch],
                    settings.to_sampler(self.batch_size),
                    settings.size_hw,
                    self.precision,
                    texts=texts,
                )
                for (path, _), image in zip(batch, images, strict=True):
                    write_image(path, image)
                done(len(batch))

    def _own_batches(self, wanted: list[tuple[Path, GridCell]], process: ProcessInfo) -> Iterator[list[list]]:
        """The batches of this process, one list for each model; every batch without the images that exist."""
        number = itertools.count()
        by_weights: dict[tuple, list[tuple[Path, GridCell]]] = {}
        for path, cell in wanted:
            weights = cell.subject.name, cell.scale, cell.step, cell.width
            by_weights.setdefault(weights, []).append((path, cell))
        for of_model in by_weights.values():
            own = []
            for _, alike in itertools.groupby(sorted(of_model, key=_settings), _settings):
                for batch in _batches(list(alike), self.batch_size):
                    missing = [(path, cell) for path, cell in batch if not path.is_file()]
                    if next(number) % process.world_size == process.rank and missing:
                        own.append(missing)
            if own:
                yield own

    def _wait(self, paths: Sequence[Path], bar: tqdm) -> None:
        """Wait until the other ranks have generated their share."""
        last, count = time.monotonic(), -1
        while (now := sum(path.is_file() for path in paths)) < len(paths):
            if now != count:
                last, count = time.monotonic(), now
                bar.n = now
                bar.refresh()
            elif time.monotonic() - last > TIMEOUT_SECONDS:
                raise UserError(
                    f"{len(paths) - now} images of other ranks are missing, and none was written for "
                    f"{TIMEOUT_SECONDS // 60} minutes; see the output of the other ranks, then run the command again"
                )
            time.sleep(0.5)
        bar.update(len(paths) - bar.n)


class ImageFiles(Sequence[np.ndarray]):
    """Images as uint8 RGB, H x W x 3, read on access."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> ImageFiles: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | ImageFiles:
        if isinstance(index, slice):
            return ImageFiles(self.paths[index])
        with Image.open(self.paths[index]) as picture:
            return np.asarray(picture.convert("RGB"))


def noise_seed(settings: GenerationSettings) -> int:
    """Seed of the initial noise. It differs between prompts: with common noise, their results would be correlated."""
    return seed_of(settings.seed, "noise", settings.prompt)


def write_image(path: Path, image: np.ndarray) -> None:
    """Write a PNG atomically."""
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG")
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.getvalue())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{path.parent} cannot be written to ({error.strerror}); the images written so far are kept, and the same "
            "command with the same run_dir continues"
        ) from error


def _settings(item: tuple[Path, GridCell]) -> str:
    """What all images of a batch have in common: the settings without prompt and seed."""
    return json.dumps(asdict(replace(item[1].settings, prompt="", seed=0)))


def _batches(items: list, size: int) -> Iterator[list]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
