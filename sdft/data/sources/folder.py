"""A folder of images with their captions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from sdft.data.captions import Captions, Tags, checked_template, checked_texts
from sdft.data.decode import StoredImage
from sdft.data.error_messages import join_problems
from sdft.data.packed_strings import PackedStrings
from sdft.data.scan_cache import stamp_of
from sdft.data.source import Sample, StoredSource
from sdft.data.sources import metadata
from sdft.data.sources.splits import Split, split_indices
from sdft.errors import UserError
from sdft.types import Fraction, NonNegative

IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
CAPTION_SUFFIXES = (".txt", ".caption")


class Folder(StoredSource):
    """Images of a folder and its subfolders. The caption of `cat.jpg` is in `cat.txt` or `cat.caption`, or in a table
    `metadata.jsonl`, `.csv` or `.parquet`; a file beside the image takes precedence over a table.

    root: the folder.
    split: `train`, `validation` or `all`. Images are assigned by file name, so adding images never moves others.
    held_out: share of the images in `validation`.
    caption: format string of the training caption; `{caption}` is the image's own.
    default_caption: of images without one, which are an error if it is None.
    tags: augmentation of captions that are lists of tags.
    loss_weight: factor on the loss of these images.

    Raises UserError for a missing folder, too few images, and missing or unreadable captions, all named.
    """

    def __init__(
        self,
        root: str,
        split: Split,
        held_out: Fraction = 0.1,
        caption: str = "{caption}",
        default_caption: str | None = None,
        tags: Tags | None = None,
        loss_weight: NonNegative = 1.0,
    ):
        self.root, self.loss_weight, self.tags = Path(root).expanduser(), loss_weight, tags
        self.template = checked_template("data.caption", caption)
        keys = list_images(self.root, least=1 if split == "all" else 2)
        texts = read_captions(self.root, keys, default_caption)
        places = split_indices(keys, split, held_out)
        self.keys, self._texts = (PackedStrings(column[place] for place in places) for column in (keys, texts))

    def stored(self, index: int) -> StoredImage:
        """The image file."""
        file = self.root / self.keys[index]
        return StoredImage(str(file), file.read_bytes, partial(stamp_of, file))

    def __getitem__(self, index: int) -> Sample:
        captions = Captions(*metadata.unpacked(self._texts[index]), self.template, self.tags)
        return Sample(self.keys[index], self.stored(index), captions.plain, self.loss_weight, captions=captions)


def files_below(folder: str | Path, name: str = "") -> Iterator[str]:
    """Every file below a folder as a path with slashes, prefixed by `name`, sorted."""
    try:
        with os.scandir(folder) as opened:
            inside = sorted(opened, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"data.root: {folder} cannot be listed ({error.strerror}); check its permissions") from error
    for entry in inside:
        if entry.is_dir(follow_symlinks=False):
            yield from files_below(entry.path, f"{name}{entry.name}/")
        elif not entry.is_dir():
            yield name + entry.name


def list_images(root: Path, least: int = 2) -> PackedStrings:
    """Every image below `root` as a relative path, sorted. Raises UserError for fewer than `least`."""
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder")
    keys = PackedStrings(key for key in files_below(root) if os.path.splitext(key)[1].lower() in IMAGE_SUFFIXES)
    if len(keys) < least:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"data.root={root}: found {len(keys)} images, need at least {least} ({kinds})")
    return keys


def read_captions(root: Path, keys: Sequence[str], default: str | None) -> PackedStrings:
    """The captions of every image, packed. Raises UserError naming all that are missing or wrong."""
    tables = [key for key in files_below(root) if key.rpartition("/")[2] in metadata.NAMES]
    in_tables, wrong = metadata.read_tables(root, tables)
    wrong += [f"{root / key} is named in a table but does not exist" for key in sorted(set(in_tables) - set(keys))]
    if wrong:
        raise UserError(f"data.root: {join_problems(wrong)}; repair the table")
    found, missing = PackedStrings(), []
    for key in keys:
        try:
            beside = text_beside(root / key)
            texts = (checked_texts([beside]), ()) if beside is not None else in_tables.get(key)
            if texts is None and default is None:
                raise ValueError("has no caption")
            found.append(metadata.packed(texts or ((default or "",), ())))
        except ValueError as error:
            missing.append((root / key, str(error)))
    if missing:
        raise UserError(f"data.root: {remedy(missing)}")
    return found


def text_beside(file: Path) -> str | None:
    """The text of the caption file of an image; None if there is none. Raises ValueError with the reason."""
    for suffix in CAPTION_SUFFIXES:
        beside = file.with_suffix(suffix)
        try:
            return beside.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            continue
        except UnicodeDecodeError as error:
            raise ValueError(f"has a caption that is not UTF-8 (byte {error.start} of {beside.name})") from error
        except OSError as error:
            raise ValueError(f"has a caption that cannot be read ({beside.name}: {error.strerror})") from error
    return None


def remedy(missing: list[tuple[Path, str]]) -> str:
    """The error message for images with missing or wrong captions."""
    if len(missing) == 1:
        file, problem = missing[0]
        where = f"{file} {problem}; write one to {file.with_suffix('.txt').name} beside it"
    else:
        named = join_problems([f"{file} {problem}" for file, problem in missing])
        where = f"{len(missing)} images have no usable caption: {named}; write each to a .txt beside its image"
    return f"{where}, or set data.default_caption='...' for those without one"
