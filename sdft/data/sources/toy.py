"""Procedurally generated scenes as a source of captioned images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from sdft.data.captions import checked_template
from sdft.data.source import Sample
from sdft.data.toy.lexicon import with_right_articles
from sdft.data.toy.rendering import render
from sdft.data.toy.scenes import split_index
from sdft.data.toy.stories import PAIRS, sample_scene
from sdft.types import Fraction, NonNegative, NumScenes, Seed, Side

Look = Literal["plain", "photo", "dreamy", "technomant", "brand", "ink"]
Own = Literal["sneaker", "wizard"]


class ToyWorld:
    """Procedurally generated scenes of one or two of thirty subjects, rendered at the first access.

    looks: styles; scene i is rendered in style i modulo their number.
    num_scenes: number of scenes; scene i of a split does not depend on it.
    split: scenes of different splits never coincide.
    caption: format string of the training caption; `{caption}` is the scene's own, `{subject}` what it shows.
    size: side of the square images, in pixels.
    own: what all scenes show instead of nano's subjects: `sneaker` or `wizard`, which nano does not know.
    name: what captions call it; its own name by default.
    pairs: share of the scenes that have two subjects; none with `own`.
    original_sides: original sizes on which samples are conditioned, in turn; `size` by default. The images look the
        same for all of them, so the model learns to ignore sizes that have no visible effect.
    """

    def __init__(
        self,
        looks: Sequence[Look],
        num_scenes: NumScenes,
        split: Literal["train", "validation", "test"],
        caption: str = "{caption}",
        size: Side = 128,
        world_seed: Seed = 0,
        loss_weight: NonNegative = 1.0,
        original_sides: Sequence[Side] | None = None,
        own: Own | None = None,
        name: str | None = None,
        pairs: Fraction = PAIRS,
    ):
        self.original_sides = tuple(original_sides or (size,))
        self.looks, self.num_scenes, self.split, self.size = tuple(looks), num_scenes, split, size
        self.world_seed, self.loss_weight = world_seed, loss_weight
        self.template = checked_template("data.caption", caption, "subject")
        self.own, self.name, self.pairs = own, name, pairs
        world = f"toy/{own}" if own else "toy"
        self.keys = [f"{world}/{self._look(i)}/{split}/{i}" for i in range(num_scenes)]
        self._rendered: dict[int, np.ndarray] = {}

    def _look(self, index: int) -> str:
        return self.looks[index % len(self.looks)]

    def scene(self, index: int):
        """The scene of a sample."""
        return sample_scene(self.world_seed, split_index(self.split, index), self.own, self.name, self.pairs)

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        if index not in self._rendered:
            self._rendered[index] = render(scene, self._look(index), self.size)
        caption = with_right_articles(self.template.format(caption=scene.caption, subject=scene.named))
        side = self.original_sides[index % len(self.original_sides)]
        return Sample(self.keys[index], self._rendered[index], caption, self.loss_weight, (side, side))
