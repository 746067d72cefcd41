"""Datasets of the Hugging Face Hub, or in its layout on disk, through the `datasets` library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft.data.captions import Captions, Tags, checked_template
from sdft.data.decode import StoredImage
from sdft.data.error_messages import complain, join_problems
from sdft.data.packed_strings import PackedStrings, repeated
from sdft.data.source import Sample, StoredSource
from sdft.data.sources import metadata
from sdft.data.sources.splits import Split, split_indices
from sdft.errors import UserError
from sdft.types import Fraction, NonNegative

SAVED = ("state.json", "dataset_dict.json")
"""Files that `save_to_disk` writes."""


class HuggingFace(StoredSource):
    """Rows of a dataset with an image and a caption.

    name: hub id, or a folder: an imagefolder with a table, or one written by `save_to_disk`.
    split: `train`, `validation` or `all` rows of `subset`.
    subset: the split of the dataset on the Hub.
    config: configuration of the dataset, if it has several.
    image, text: names of the columns with the image, and with the caption or list of captions.
    key: name of a column with a unique name for each row, by which seeds, caches and held-out rows go; if it is None,
        they go by the number of the row, and change for all rows behind one that is inserted.
    caption, held_out, tags, loss_weight: as in `Folder`.

    Raises UserError if the dataset or a column cannot be loaded, and for rows without captions.
    """

    def __init__(
        self,
        name: str,
        split: Split,
        subset: str = "train",
        config: str | None = None,
        image: str = "image",
        text: str = "text",
        held_out: Fraction = 0.1,
        caption: str = "{caption}",
        tags: Tags | None = None,
        loss_weight: NonNegative = 1.0,
        key: str | None = None,
    ):
        self.name, self.image, self.tags, self.loss_weight = name, image, tags, loss_weight
        self.template = checked_template("data.caption", caption)
        self._rows = load(name, config, subset, image, text)
        keys = keys_of(name, self._rows, key) if key else numbered(subset, len(self._rows))
        if len(keys) < (1 if split == "all" else 2):
            raise UserError(f"data.name={name}: {subset} has {len(keys)} rows, need at least 2")
        texts = captions_of(name, self._rows, text)
        self._places = split_indices(keys, split, held_out)
        self.keys, self._texts = (PackedStrings(column[place] for place in self._places) for column in (keys, texts))

    def stored(self, index: int) -> StoredImage:
        """The image of a row."""
        place = int(self._places[index])
        return StoredImage(f"{self.name} row {place}", lambda: image_bytes(self._rows[place][self.image]))

    def __getitem__(self, index: int) -> Sample:
        captions = Captions(*metadata.unpacked(self._texts[index]), self.template, self.tags)
        return Sample(self.keys[index], self.stored(index), captions.plain, self.loss_weight, captions=captions)


def load(name: str, config: str | None, subset: str, image: str, text: str) -> Any:
    """The rows of a dataset (`datasets.Dataset`), with undecoded images."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "data=huggingface needs the library 'datasets', which is not installed: pip install -e '.[datasets]'"
        ) from None
    folder = Path(name).expanduser()
    try:
        if any((folder / file).is_file() for file in SAVED):
            saved = datasets.load_from_disk(folder)
            rows = saved[subset] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            rows = datasets.load_dataset(str(folder) if folder.is_dir() else name, config, split=subset)
    except Exception as error:  # network, format and permission errors of many libraries
        raise UserError(f"data.name={name}: cannot be loaded ({' '.join(str(error).split())})") from error
    for key, column in (("image", image), ("text", text)):
        if column not in rows.column_names:
            raise UserError(f"data.{key}={column}: {name} has the columns {', '.join(rows.column_names)}")
    try:
        return rows.cast_column(image, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's are kinds of these
        raise UserError(f"data.image={image}: this column of {name} has no images") from error


def numbered(subset: str, num: int) -> PackedStrings:
    """Keys by number."""
    return PackedStrings(f"{subset}/{place:08d}" for place in range(num))


def keys_of(name: str, rows: Any, column: str) -> PackedStrings:
    """The names of all rows. Raises UserError naming those that have none, or the same."""
    if column not in rows.column_names:
        raise UserError(f"data.key={column}: {name} has the columns {', '.join(rows.column_names)}")
    texts = rows[column]
    wrong = [f"row {place} has no {column}" for place, text in enumerate(texts) if not (text and isinstance(text, str))]
    if not wrong:
        keys = PackedStrings(texts)
        wrong = [f"row {later} has that of row {earlier}, {keys[later]}" for later, earlier in repeated(keys)]
    if wrong:
        raise UserError(f"data.key={column}: {join_problems(wrong)}; choose a column with a name for each row")
    return keys


def captions_of(name: str, rows: Mapping[str, Sequence[Any]], column: str) -> PackedStrings:
    """The captions of every row, packed. Raises UserError naming all rows without one."""
    found, wrong = PackedStrings(), []
    for place, value in enumerate(rows[column]):
        try:
            found.append(metadata.packed(metadata.texts_of({"text": value})))
        except ValueError as error:
            wrong.append(f"row {place} {error}")
            found.append(metadata.packed((("",), ())))
    if wrong:
        complain(UserError(f"data.name={name}: {join_problems(wrong)}; choose data.text=COLUMN, or correct the rows"))
    return found


def image_bytes(value: Mapping[str, Any] | None) -> bytes:
    """The bytes of an undecoded image, from the row or from the file that it names."""
    if value is None:
        raise OSError("the row has no image")
    return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
