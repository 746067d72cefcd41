"""The pictures of a comparison on disk, each named by everything that it was made from.

So a picture is made once: what is there is not made again, and a comparison that was stopped goes on. Knows cells,
files and ranks. Must not know how pictures are judged.
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
from typing import Literal, overload

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
"""Seconds without a new picture after which rank 0 gives up on the others."""


class ImageCache:
    """Draws cells that are not there yet.

    folder: of the pictures. batch_size: pictures at a time.
    """

    def __init__(self, folder: Path, models: SubjectLoader, precision: Literal["fp32", "bf16"], batch_size: int):
        self.folder, self.models, self.precision, self.batch_size = folder, models, precision, batch_size

    def path(self, cell: GridCell) -> Path:
        """Of a cell's picture, whether or not it is there."""
        weights = self.models.identity(cell.subject, cell.scale, cell.step)
        said = [weights, asdict(cell.settings), self.precision, self.models.device.type, VERSIONS]
        digest = hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=12)
        return self.folder / f"{digest.hexdigest()}.png"

    def fill(self, cells: Sequence[GridCell], process: ProcessInfo = ProcessInfo()) -> None:
        """Draw what is missing; rank 0 comes back when every picture is there, the others after their own.

        The batches are those of the whole grid, so what was stopped goes on with the same ones, and the same bits.
        """
        wanted = {self.path(cell): cell for cell in cells}
        missing = {path for path in wanted if not path.is_file()}
        with tqdm(total=len(missing), desc="drawing", unit="image", disable=process.rank > 0 or not missing) as bar:
            self._draw(list(wanted.items()), process, bar.update)
            if process.rank == 0 and process.world_size > 1:
                self._wait(list(missing), bar)

    def _draw(self, wanted: list[tuple[Path, GridCell]], process: ProcessInfo, drawn: Callable[[int], object]) -> None:
        number = itertools.count()
        by_weights: dict[tuple, list[tuple[Path, GridCell]]] = {}
        for path, cell in wanted:
            by_weights.setdefault((cell.subject.name, cell.scale, cell.step), []).append((path, cell))
        for of_model in by_weights.values():
            mine = []
            for _, alike in itertools.groupby(sorted(of_model, key=_settings), _settings):
                for batch in _batches(list(alike), self.batch_size):
                    missing = [(path, cell) for path, cell in batch if not path.is_file()]
                    if next(number) % process.world_size == process.rank and missing:
                        mine.append(missing)
            if not mine:
                continue
            cell = mine[0][0][1]
            with self.models.open(cell.subject, cell.scale, cell.step) as model:
                texts = PromptEmbeddings(model)
                for batch in mine:
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
                    drawn(len(batch))

    def _wait(self, paths: Sequence[Path], bar: tqdm) -> None:
        """Until the other ranks have drawn their share."""
        last, there = time.monotonic(), -1
        while (now := sum(path.is_file() for path in paths)) < len(paths):
            if now != there:
                last, there = time.monotonic(), now
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
    """Pictures as H x W x 3 bytes, read when asked for."""

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
    """Of the noise that a picture starts from: its own for each prompt, so that no two prompts share their luck."""
    return seed_of(settings.seed, "noise", settings.prompt)


def write_image(path: Path, image: np.ndarray) -> None:
    """A PNG, whole or not at all."""
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
            f"{path.parent} cannot be written to ({error.strerror}); the pictures drawn so far are kept, and the same "
            "command with the same run_dir goes on"
        ) from error


def _settings(item: tuple[Path, GridCell]) -> str:
    """What a batch has in common."""
    return json.dumps(asdict(replace(item[1].settings, prompt="", seed=0)))


def _batches(items: list, size: int) -> Iterator[list]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
