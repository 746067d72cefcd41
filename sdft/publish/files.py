"""The weights and pictures of a model repository, copied from a run folder."""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdft.errors import UserError
from sdft.formats.adapter import write_words
from sdft.formats.lora_file import read_lora, write_lora_file
from sdft.formats.output import foreign_files
from sdft.formats.safetensors_io import copy_with_metadata
from sdft.publish.card import IMAGES
from sdft.publish.facts import Facts
from sdft.publish.usage import EMBEDDINGS, LORA
from sdft.training.callbacks.export import write_embeddings

THUMBNAIL = 256
"""Longest side in pixels, of `modelspec.thumbnail`."""


def write_pictures(facts: Facts, pictures: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write the pictures to `images/`, without whatever else is in their files."""
    paths = [Path(entry["path"]) for entry in pictures]
    paths += [facts.comparison] if facts.comparison.is_file() else []
    for path in paths:
        (folder / IMAGES).mkdir(exist_ok=True)
        opened(path).save(folder / IMAGES / path.name)


def opened(path: Path) -> Image.Image:
    """The pixels of an image file. Raises UserError if it is damaged."""
    try:
        with Image.open(path) as image:
            return Image.fromarray(np.asarray(image.convert("RGB")))
    except OSError as error:
        raise UserError(f"run: the image {path} cannot be read ({error}); remove it, or draw it again") from error


def thumbnail(facts: Facts, pictures: Sequence[Mapping[str, Any]]) -> str | None:
    """A small JPEG of the first picture, as a data URI; None without pictures."""
    path = Path(pictures[0]["path"]) if pictures else facts.comparison
    if not path.is_file():
        return None
    image = opened(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    written = io.BytesIO()
    image.save(written, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode()


def metadata_of(facts: Facts, title: str, options: Mapping[str, Any], small: str | None) -> dict[str, str]:
    """What is added to the metadata of the weights, by ModelSpec. options: `author`, `license`, `description`."""
    values = {
        "modelspec.title": title,
        "modelspec.author": options["author"],
        "modelspec.description": options["description"],
        "modelspec.license": options["license"],
        "modelspec.tags": "text-to-image, " + ("stable-diffusion-xl" if not facts.is_nano else "nano"),
        "modelspec.trigger_phrase": facts.trigger,
        "modelspec.usage_hint": f"Prompt: {facts.example}",
        "modelspec.thumbnail": small,
    }
    return {name: str(value) for name, value in values.items() if value}


def write_weights(facts: Facts, title: str, folder: Path, metadata: Mapping[str, str]) -> None:
    """Write the weights: an adapter in both layouts, new words, or a whole model."""
    targets = {"lora": LORA, "lora_kohya": f"{title}.safetensors", "single_file": f"{title}.safetensors"}
    for kind, name in targets.items():
        if kind == "lora" and facts.chosen is not None and kind in facts.artifacts:
            lora = read_lora(facts.artifacts[kind], kind)
            write_lora_file(lora, folder / name, "diffusers", torch.float16, {**lora.metadata, **metadata})
        elif kind in facts.artifacts:
            copy_with_metadata(facts.artifacts[kind], folder / name, metadata)
    if facts.words is not None:
        write_words(facts.words, folder / "words.safetensors")
        write_embeddings(facts.words, folder / EMBEDDINGS)
    if facts.kind == "model":
        copy_model(facts.artifacts["model"], folder)


def copy_model(source: Path, folder: Path) -> None:
    """Copy the files of a diffusers folder, and no others; large ones as hard links where that is possible."""
    foreign = set(foreign_files(source))
    for file in sorted(path for path in source.rglob("*") if path.is_file() and not path.is_symlink()):
        name = file.relative_to(source)
        if {str(name), f"{name.parts[0]}/"} & foreign:
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, folder / name)
        except OSError:
            shutil.copyfile(file, folder / name)
