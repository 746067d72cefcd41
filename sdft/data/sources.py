"""Where captioned pictures come from: the procedural toy world, a folder.

Each source lists its keys without reading pictures, and reads one picture by index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sdft.data.dataset import Sample, Source
from sdft.data.toy.looks import render
from sdft.data.toy.scenes import sample_scene, split_index
from sdft.rng import seed_of
from sdft.types import Count, Fraction, NonNegative, UserError

Look = Literal["plain", "photo", "dreamy", "technomant"]
Split = Literal["train", "validation", "test"]
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


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
        split: Split,
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


class Folder:
    """Pictures of a folder and its sub-folders; the caption of `cat.jpg` stands in `cat.txt` or `cat.caption`.

    root: the folder.
    split: `train` or `validation`; the held-out share is chosen by file name, so adding pictures moves none.
    held_out: share of the pictures that `validation` gets.
    caption: how a picture's own `{caption}` becomes the training caption.
    default_caption: used where a picture has no caption file; without it, such a picture is an error.
    """

    def __init__(
        self,
        root: str,
        split: Literal["train", "validation"],
        held_out: Fraction = 0.1,
        caption: str = "{caption}",
        default_caption: str | None = None,
        loss_weight: NonNegative = 1.0,
    ):
        self.root, self.loss_weight = Path(root).expanduser(), loss_weight
        self.template = checked_template("data.caption", caption)
        files = list_pictures(self.root)
        chosen = held_out_files(files, self.root, held_out)
        self.files = [f for f in files if (f in chosen) == (split == "validation")]
        self.captions = [self._caption(file, default_caption) for file in self.files]
        self.keys = [file.relative_to(self.root).as_posix() for file in self.files]

    def _caption(self, file: Path, default: str | None) -> str:
        for suffix in (".txt", ".caption"):
            if (beside := file.with_suffix(suffix)).is_file():
                return self.template.format(caption=" ".join(beside.read_text(encoding="utf-8").split()))
        if default is None:
            raise UserError(
                f"data.root: {file} has no caption; write one into {file.with_suffix('.txt').name} beside it, "
                "or set data.default_caption='...'"
            )
        return self.template.format(caption=default)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.keys[index], read_picture(self.files[index]), self.captions[index], self.loss_weight)


class Mix:
    """Several sources as one, each repeated as often as said.

    sources: name -> source; the name becomes part of the keys.
    repeats: name -> how often a pass over the data shows each of its pictures; 1 where not said.
    """

    def __init__(self, sources: dict[str, Source], repeats: dict[str, Count] | None = None):
        repeats = repeats or {}
        if unknown := set(repeats) - set(sources):
            raise UserError(f"data.repeats names {sorted(unknown)}; the sources are {sorted(sources)}")
        self._entries = [
            (source, index, f"{name}/{key}" + (f"#{again}" if again else ""))
            for name, source in sources.items()
            for again in range(repeats.get(name, 1))
            for index, key in enumerate(source.keys)
        ]
        self.keys = [key for _, _, key in self._entries]

    def __getitem__(self, position: int) -> Sample:
        source, index, key = self._entries[position]
        sample = source[index]
        return replace(sample, key=key)


def checked_template(key: str, template: str, *fields: str) -> str:
    """The template, if its fields are `{caption}` and `fields`."""
    try:
        template.format(caption="", **{field: "" for field in fields})
    except (KeyError, IndexError, ValueError) as error:
        known = ", ".join(f"{{{field}}}" for field in ("caption", *fields))
        raise UserError(f"{key}={template!r}: its fields can be {known} ({error!r})") from error
    return template


def list_pictures(root: Path) -> list[Path]:
    """Every picture below `root`, in order of name."""
    if not root.is_dir():
        raise UserError(f"data.root={root}: there is no such folder")
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if len(files) < 2:
        raise UserError(
            f"data.root={root}: found {len(files)} pictures, need at least 2 ({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    return files


def held_out_files(files: Sequence[Path], root: Path, share: float) -> set[Path]:
    """About `share` of the files, at least one and not all: those whose name hashes below it."""
    place = {file: seed_of(0, "held out", file.relative_to(root).as_posix()) / 2**63 for file in files}
    ranked = sorted(files, key=place.__getitem__)
    chosen = [file for file in ranked if place[file] < share] or ranked[:1]
    return set(chosen[: len(files) - 1])


def read_picture(file: Path) -> np.ndarray:
    """RGB bytes, upright, transparency on white."""
    try:
        with Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return np.asarray(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(f"data.root: {file} cannot be read as a picture ({error}); repair or remove it") from error
