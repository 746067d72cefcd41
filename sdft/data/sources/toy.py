"""The procedural toy world as a source of captioned pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from sdft.data.captions import checked_template
from sdft.data.source import Sample
from sdft.data.toy.looks import render
from sdft.data.toy.scenes import sample_scene, split_index
from sdft.types import Count, NonNegative

Look = Literal["plain", "photo", "dreamy", "technomant"]


class ToyWorld:
    """Scenes of the procedural world, rendered when first asked for.

    looks: each scene is drawn in one of them, in turn.
    num_scenes: how many; scene i of a split is the same whatever their number.
    split: scenes of different splits are never the same.
    caption: how a scene's own `{caption}` becomes the training caption; `{subject}` is what it shows.
    original_sides: the sides pictures are said to have had before they were reduced to `size`, in turn. A reduced
        picture looks the same whatever it was reduced from, so the model learns to ignore what does not show.
    size: side of the square pictures, in pixels.
    """

    def __init__(
        self,
        looks: Sequence[Look],
        num_scenes: Count,
        split: Literal["train", "validation", "test"],
        caption: str = "{caption}",
        size: Count = 64,
        world_seed: int = 0,
        loss_weight: NonNegative = 1.0,
        original_sides: Sequence[Count] | None = None,
    ):
        self.original_sides = tuple(original_sides or (size,))
        self.looks, self.num_scenes, self.split, self.size = tuple(looks), num_scenes, split, size
        self.world_seed, self.loss_weight = world_seed, loss_weight
        self.template = checked_template("data.caption", caption, "subject")
        self.keys = [f"toy/{self._look(i)}/{split}/{i}" for i in range(num_scenes)]
        self._rendered: dict[int, np.ndarray] = {}

    def _look(self, index: int) -> str:
        return self.looks[index % len(self.looks)]

    def scene(self, index: int):
        """The scene behind a sample."""
        return sample_scene(self.world_seed, split_index(self.split, index))

    def __getitem__(self, index: int) -> Sample:
        if index not in self._rendered:
            self._rendered[index] = render(self.scene(index), self._look(index), self.size)
        scene = self.scene(index)
        caption = self.template.format(caption=scene.caption, subject=scene.subject)
        side = self.original_sides[index % len(self.original_sides)]
        return Sample(self.keys[index], self._rendered[index], caption, self.loss_weight, (side, side))
