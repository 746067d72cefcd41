"""Writes down some of the training pictures with their captions, for the page of the run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from PIL import Image

from sdft.board.previews import evenly
from sdft.board.run_page import TRAINING_PICTURES
from sdft.data.source import Source, shard_numbers
from sdft.data.sources.shard_copies import MAY_FETCH
from sdft.errors import UserError
from sdft.pages import html

MOST, SIDE = 12, 192
SECONDS = 0.3
"""Of reading pictures at a time."""


class TrainingPictures:
    """Reads a few pictures at a time, until it has enough: large ones take long to decode.

    run_dir: `training_pictures.json` is written there.
    """

    def __init__(self, run_dir: Path):
        self.file = run_dir / TRAINING_PICTURES
        self._found: list[dict[str, Any]] = []
        self._left: list[int] | None = None

    def note(self, data: Any) -> None:
        """Read further pictures of a data module, if there are any, and write all that were read."""
        source = getattr(getattr(data, "train_set", None), "source", None)
        if source is None or self._left == []:
            return
        if self._left is None:
            self._left = chosen(source)
        until, token = time.monotonic() + SECONDS, MAY_FETCH.set(False)
        try:
            while self._left and time.monotonic() < until:
                self._read(source, self._left.pop(0))
        finally:
            MAY_FETCH.reset(token)
        self.file.write_text(json.dumps(self._found, ensure_ascii=False), encoding="utf-8")

    def _read(self, source: Source, index: int) -> None:
        try:
            sample = source[index]
            small = html.thumbnail(Image.fromarray(sample.image_HWC), SIDE)
        except (UserError, OSError):  # a shard that is not here, a picture that was deleted
            return
        every = sample.captions.every if sample.captions else None
        captions = list((every or [sample.caption])[:4])
        self._found.append({"key": sample.key, "captions": captions, "thumbnail": small})


def chosen(source: Source) -> list[int]:
    """Indices of pictures over the whole set, but of the first shard where there are shards."""
    numbers = shard_numbers(source)
    places = range(len(source.keys))
    if numbers is not None and len(numbers):
        places = [int(i) for i in (numbers == numbers[0]).nonzero()[0]]  # type: ignore[assignment]
    return evenly(places, MOST)
