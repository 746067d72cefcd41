"""A folder of pictures, their captions beside them."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from sdft.data.captions import Captions, Tags, checked_template, checked_texts
from sdft.data.dataset import Sample
from sdft.data.decode import Encoded
from sdft.data.problems import listed
from sdft.data.record import stamp_of
from sdft.data.sources import metadata
from sdft.data.sources.splits import Split, places_of
from sdft.types import Fraction, NonNegative, UserError

IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
CAPTION_SUFFIXES = (".txt", ".caption")


class Folder:
    """Pictures of a folder and its sub-folders; the caption of `cat.jpg` stands in `cat.txt` or `cat.caption`, or in
    a table `metadata.jsonl`, `.csv` or `.parquet`. A file beside the picture counts more than a table.

    root: the folder.
    split: `train`, `validation` or `all`; the held-out share is chosen by file name, so adding pictures moves none.
    held_out: share of the pictures that `validation` gets.
    caption: how a picture's own `{caption}` becomes the training caption.
    default_caption: used where a picture has no caption; without it, such a picture is an error.
    tags: how captions that are lists of tags vary from visit to visit.
    loss_weight: of these pictures.
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
        keys = list_pictures(self.root, least=1 if split == "all" else 2)
        texts = read_captions(self.root, keys, default_caption)
        places = places_of(keys, split, held_out)
        self.keys, self._texts = [keys[place] for place in places], [texts[place] for place in places]

    def encoded(self, index: int) -> Encoded:
        """The picture as its file holds it."""
        file = self.root / self.keys[index]
        return Encoded(str(file), file.read_bytes, partial(stamp_of, file))

    def __getitem__(self, index: int) -> Sample:
        captions = Captions(*self._texts[index], self.template, self.tags)
        return Sample(self.keys[index], self.encoded(index), captions.plain, self.loss_weight, captions=captions)


def list_files(root: Path) -> list[str]:
    """Every file below `root` as a relative path with slashes, in order of name."""
    if not root.is_dir():
        raise UserError(f"data.root={root}: there is no such folder")
    found = []
    for folder, _, names in os.walk(root):
        inside = Path(folder).relative_to(root)
        found += [(inside / name).as_posix() for name in names]
    return sorted(found, key=lambda key: key.split("/"))


def list_pictures(root: Path, least: int = 2) -> list[str]:
    """Every picture below `root` as a relative path, in order of name."""
    keys = [key for key in list_files(root) if os.path.splitext(key)[1].lower() in IMAGE_SUFFIXES]
    if len(keys) < least:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"data.root={root}: found {len(keys)} pictures, need at least {least} ({kinds})")
    return keys


def read_captions(root: Path, keys: list[str], default: str | None) -> list[metadata.Texts]:
    """The captions of every picture. Raises UserError with everything that is missing or wrong."""
    tables = [key for key in list_files(root) if key.rpartition("/")[2] in metadata.NAMES]
    told, wrong = metadata.read_tables(root, tables)
    wrong += [f"{root / key} is named in a table and is not there" for key in sorted(set(told) - set(keys))]
    if wrong:
        raise UserError(f"data.root: {listed(wrong)}; repair the table")
    found: list[metadata.Texts] = []
    missing = []
    for key in keys:
        try:
            beside = text_beside(root / key)
            texts = (checked_texts([beside]), ()) if beside is not None else told.get(key)
            if texts is None and default is None:
                raise ValueError("has no caption")
            found.append(texts or ((default or "",), ()))
        except ValueError as error:
            missing.append((root / key, str(error)))
    if missing:
        raise UserError(f"data.root: {remedy(missing)}")
    return found


def text_beside(file: Path) -> str | None:
    """The text of the caption file beside a picture."""
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
    """What is wrong with the captions of some pictures, and what to do."""
    if len(missing) == 1:
        file, problem = missing[0]
        where = f"{file} {problem}; write one into {file.with_suffix('.txt').name} beside it"
    else:
        named = listed([f"{file} {problem}" for file, problem in missing])
        where = f"{len(missing)} pictures have no usable caption: {named}; write each into a .txt beside its picture"
    return f"{where}, or set data.default_caption='...' for those without one"
