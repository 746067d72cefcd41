"""A folder of images with their captions."""

from __future__ import annotations

import errno
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

from sdft.data.captions import Captions, Tags, checked_template, checked_texts
from sdft.data.decode import IMAGE_SUFFIXES, OTHER_PICTURES, StoredImage
from sdft.data.error_messages import complain, join_problems
from sdft.data.packed_strings import PackedStrings
from sdft.data.scan_cache import stamp_of
from sdft.data.source import Sample, StoredSource
from sdft.data.sources import metadata
from sdft.data.sources.listing import Listing
from sdft.data.sources.splits import Split, split_indices
from sdft.errors import UserError
from sdft.types import Fraction, NonNegative

CAPTION_SUFFIXES = (".txt", ".caption")
MASK_ENDINGS = (".mask.png", "-masklabel.png")
"""What the name of a mask ends with, behind that of its image without suffix; the second is OneTrainer's."""


class Folder(StoredSource):
    """Images of a folder and its subfolders. The caption of `cat.jpg` is in `cat.txt` or `cat.caption`, or in a table
    `metadata.jsonl`, `.csv` or `.parquet`; a file beside the image takes precedence over a table. Names may be in
    upper or lower case. A mask is in `cat.mask.png`. What is left out (see `sdft.data.sources.listing`) is counted in
    `left_out`.

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
        listing = Listing(self.root)
        keys = list_images(listing, least=1 if split == "all" else 2)
        texts = read_captions(listing, keys, default_caption)
        self._masks = masks_of(listing, keys)
        self.left_out = [*listing.lines(), *unreadable_kinds(listing)]
        places = split_indices(keys, split, held_out)
        self.keys, self._texts = (PackedStrings(column[place] for place in places) for column in (keys, texts))

    def stored(self, index: int) -> StoredImage:
        """The image file."""
        return stored_file(self.root / self.keys[index])

    def mask(self, index: int) -> StoredImage | None:
        name = self._masks.get(self.keys[index])
        return stored_file(self.root / name) if name else None

    def __getitem__(self, index: int) -> Sample:
        captions = Captions(*metadata.unpacked(self._texts[index]), self.template, self.tags)
        return Sample(self.keys[index], self.stored(index), captions.plain, self.loss_weight, captions=captions)


def stored_file(file: Path) -> StoredImage:
    """An image file."""
    return StoredImage(str(file), file.read_bytes, partial(stamp_of, file))


def sharing_stems(keys: Sequence[str]) -> set[str]:
    """The images whose name but for its suffix is that of another one too: a file called after it would be of both."""
    stems = Counter(os.path.splitext(key)[0] for key in keys)
    return {key for key in keys if stems[os.path.splitext(key)[0]] > 1}


def mask_base(key: str) -> str | None:
    """The image of a mask without its suffix; None for a name that is not that of a mask."""
    return next((key[: -len(ending)] for ending in MASK_ENDINGS if key.lower().endswith(ending)), None)


def masks_of(listing: Listing, keys: Sequence[str]) -> dict[str, str]:
    """Image -> its mask, `cat.jpg.mask.png` or `cat.mask.png` beside `cat.jpg`. Masks without an image are counted as
    left out."""
    masks = {base: name for name in listing.files if (base := mask_base(name)) is not None}
    found = {}
    for key in keys:
        name = masks.get(key) or masks.get(os.path.splitext(key)[0])
        if name is not None:
            found[key] = name
    if lost := set(masks.values()) - set(found.values()):
        listing.left_out["a mask without its image"] += len(lost)
    return found


def list_images(listing: Listing, least: int = 2) -> PackedStrings:
    """Every image of a listing as a relative path, sorted. Raises UserError for fewer than `least`."""
    keys = PackedStrings(key for key in listing.files if suffix_of(key) in IMAGE_SUFFIXES and not mask_base(key))
    if len(keys) < least:
        others = "".join(f"; {line}" for line in [*listing.lines(), *unreadable_kinds(listing)])
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise UserError(f"data.root={listing.root}: found {len(keys)} images, need at least {least} ({kinds}){others}")
    return keys


def unreadable_kinds(listing: Listing) -> list[str]:
    """How many pictures have formats that cannot be read here, a line for each, with the remedy."""
    found = Counter(suffix for key in listing.files if (suffix := suffix_of(key)) in OTHER_PICTURES)
    return [
        f"{count} x a picture that cannot be read here ({suffix}: {OTHER_PICTURES[suffix]})"
        for suffix, count in sorted(found.items())
    ]


def suffix_of(key: str) -> str:
    """The suffix of a file name in lower case."""
    return os.path.splitext(key)[1].lower()


def read_captions(listing: Listing, keys: Sequence[str], default: str | None) -> PackedStrings:
    """The captions of every image, packed. Raises UserError naming all that are missing or wrong."""
    root = listing.root
    tables = [key for key in listing.files if key.rpartition("/")[2].lower() in metadata.NAMES]
    in_tables, wrong = metadata.read_tables(root, tables)
    in_tables, lost = as_spelled_here(in_tables, keys)
    wrong += [f"{root / key} is named in a table but does not exist" for key in lost]
    if wrong:
        complain(UserError(f"data.root: {join_problems(wrong)}; repair the table"))
    found, missing, texts_beside = PackedStrings(), [], TextsBeside(listing, keys)
    for key in keys:
        try:
            beside = texts_beside.of(key)
            texts = (checked_texts([beside]), ()) if beside and not beside.isspace() else in_tables.get(key)
            if texts is None and default is None:
                raise ValueError("has no caption" if beside is None else "has an empty caption")
            found.append(metadata.packed(texts or ((default or "",), ())))
        except ValueError as error:
            missing.append((root / key, str(error)))
            found.append(metadata.packed(((default or "",), ())))
    if missing:
        complain(UserError(f"data.root: {remedy(missing)}"))
    return found


def as_spelled_here(
    in_tables: Mapping[str, metadata.WeightedTexts], keys: Sequence[str]
) -> tuple[dict[str, metadata.WeightedTexts], list[str]]:
    """The captions of tables by the keys of their images, and names that are of none.

    A name that is of none as it is may differ in case, in its slashes, or in how accents are composed: tables come from
    other systems.
    """
    known = set(keys)
    found = {name: texts for name, texts in in_tables.items() if name in known}
    others = {name: texts for name, texts in in_tables.items() if name not in known}
    if not others:
        return found, []
    here = defaultdict(list)
    for key in keys:
        here[spelling(key)].append(key)
    lost = []
    for name, texts in others.items():
        matching = [key for key in here[spelling(name)] if key not in found]
        if len(matching) == 1:
            found[matching[0]] = texts
        else:
            lost.append(name)
    return found, sorted(lost)


def spelling(name: str) -> str:
    """The same for names that differ in case, slashes or composition of accents only."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()


class TextsBeside:
    """The caption files beside images.

    That of `cat.jpg` is `cat.jpg.txt`, else `cat.txt` or `cat.caption`. Where there is none, one that differs in case
    or in the composition of accents only is taken, such as `CAT.TXT`, unless another image has it.
    """

    def __init__(self, listing: Listing, keys: Sequence[str]):
        self.root, self.listing, self.keys = listing.root, listing, keys

    def of(self, key: str) -> str | None:
        """The text for an image; None if there is none. Raises ValueError with the reason."""
        stem = os.path.splitext(key)[0]
        for name in (f"{start}{suffix}" for start in (key, stem) for suffix in CAPTION_SUFFIXES):
            text = None if name in self.listing.never_opened else read_text(self.root / name)
            if text is not None:
                return text
        others = self._spelled_otherwise.get(spelling(stem), [])
        if len(others) > 1:
            raise ValueError(f"has several captions ({', '.join(others)}); keep one")
        return read_text(self.root / others[0]) if others else None

    @cached_property
    def _spelled_otherwise(self) -> dict[str, list[str]]:
        """Spelling of a stem -> caption files that are not those of an image by their exact name."""
        stems = {os.path.splitext(key)[0] for key in self.keys} | set(self.keys)
        found = defaultdict(list)
        for name in self.listing.files:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in CAPTION_SUFFIXES and not (stem in stems and suffix in CAPTION_SUFFIXES):
                found[spelling(stem)].append(name)
        return found


def read_text(file: Path) -> str | None:
    """The text of a caption file; None if there is none. Raises ValueError with the reason."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise ValueError(f"has a caption that is not UTF-8 (byte {error.start} of {file.name})") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None  # no file can have this name
        raise ValueError(f"has a caption that cannot be read ({file.name}: {error.strerror})") from error


def remedy(missing: list[tuple[Path, str]]) -> str:
    """The error message for images with missing or wrong captions."""
    if len(missing) == 1:
        file, problem = missing[0]
        where = f"{file} {problem}; write one to {file.with_suffix('.txt').name} beside it"
    else:
        named = join_problems([f"{file} {problem}" for file, problem in missing])
        where = f"{len(missing)} images have no usable caption: {named}; write each to a .txt beside its image"
    return f"{where}, or set data.default_caption='...' for those without one"
