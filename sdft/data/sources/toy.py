"""Procedurally generated scenes as a source of captioned images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from sdft.data.captions import checked_template
from sdft.data.source import Sample
from sdft.data.toy.rendering import render
from sdft.data.toy.scenes import sample_scene, split_index
from sdft.data.toy.stories import sample_story
from sdft.types import NonNegative, NumScenes, Seed, Side

Look = Literal["plain", "photo", "dreamy", "technomant", "brand", "ink"]
Scenes = Literal["simple", "rich"]
Own = Literal["sneaker", "wizard"]


class ToyWorld:
    """Procedurally generated scenes, rendered at the first access.

    looks: styles; scene i is rendered in style i modulo their number.
    num_scenes: number of scenes; scene i of a split does not depend on it.
    split: scenes of different splits never coincide.
    caption: format string of the training caption; `{caption}` is the scene's own, `{subject}` what it shows.
    scenes: `simple` ones show one of 23 subjects, as nano does; `rich` ones one or two of 30, with details, and with
        what they do, wear and are made of.
    size: side of the square images, in pixels.
    own: what all scenes show instead of nano's subjects: `sneaker` or `wizard`, which nano does not know.
    name: what captions call it; its own name by default.
    original_sides: original sizes on which samples are conditioned, in turn; `size` by default. The images look the
        same for all of them, so the model learns to ignore sizes that have no visible effect.
    """

    def __init__(
        self,
        looks: Sequence[Look],
        num_scenes: NumScenes,
        split: Literal["train", "validation", "test"],
        caption: str = "{caption}",
        size: Side = 64,
        world_seed: Seed = 0,
        loss_weight: NonNegative = 1.0,
        original_sides: Sequence[Side] | None = None,
        own: Own | None = None,
        name: str | None = None,
        scenes: Scenes = "simple",
    ):
        self.original_sides = tuple(original_sides or (size,))
        self.looks, self.num_scenes, self.split, self.size = tuple(looks), num_scenes, split, size
        self.world_seed, self.loss_weight = world_seed, loss_weight
        self.template = checked_template("data.caption", caption, "subject")
        self.own, self.name = own, name
        self._sample = {"simple": sample_scene, "rich": sample_story}[scenes]
        world = f"toy/{own}" if own else "toy"
        world = world if scenes == "simple" else f"{scenes}/{world}"
        self.keys = [f"{world}/{self._look(i)}/{split}/{i}" for i in range(num_scenes)]
        self._rendered: dict[int, np.ndarray] = {}

    def _look(self, index: int) -> str:
        return self.looks[index % len(self.looks)]

    def scene(self, index: int):
        """The scene of a sample."""
        return self._sample(self.world_seed, split_index(self.split, index), self.own, self.name)

    def __getitem__(self, index: int) -> Sample:
        if index not in self._rendered:
            self._rendered[index] = render(self.scene(index), self._look(index), self.size)
        scene = self.scene(index)
        caption = self.template.format(caption=scene.caption, subject=scene.named)
        side = self.original_sides[index % len(self.original_sides)]
        return Sample(self.keys[index], self._rendered[index], caption, self.loss_weight, (side, side))
