"""The caption files of a folder of images: read, written, and never lost.

What is written is recorded in `.sdft_captions.jsonl` in the folder, with the text that was there before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdft.data.error_messages import join_problems
from sdft.data.sources import Folder
from sdft.data.sources.folder import CAPTION_SUFFIXES, read_text, sharing_stems
from sdft.data.sources.listing import OWN_RECORD
from sdft.errors import UserError

KIND = "sdft captions"
SUFFIXES = (*CAPTION_SUFFIXES, ".TXT")
Overwrite = Literal["never", "made", "all"]


@dataclass(frozen=True)
class Correction:
    """A caption that a person wrote: what was there, and what shall be."""

    before: str
    text: str


class CaptionFiles:
    """The captions of a folder of images and its subfolders, as `Folder` finds them; empty where there is none.

    An image with several captions counts as having the first one, and is never changed.

    Raises UserError for a folder without images, and for captions that cannot be read.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()
        self.source = Folder(str(self.root), "all", default_caption="")
        self.keys = self.source.keys
        self._sharing = sharing_stems(self.keys)
        self._by = dict(self._recorded())

    def _recorded(self) -> Iterator[tuple[str, tuple[str, str]]]:
        """(key, (text, who wrote it)) of everything written here."""
        try:
            lines = (self.root / OWN_RECORD).read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                row = json.loads(line)
                yield row["file"], (row["text"], row["by"])
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines):  # the last line may be cut by a kill
                    raise UserError(f"{self.root / OWN_RECORD} line {number} is damaged; remove the line") from error

    def __getitem__(self, index: int) -> str:
        captions = self.source[index].captions
        assert captions is not None
        return captions.texts[0]

    def several(self, index: int) -> bool:
        """Whether an image has more than one caption."""
        captions = self.source[index].captions
        return captions is not None and len(captions.texts) > 1

    def made_by(self, index: int) -> str | None:
        """Who wrote the caption of an image: a captioner, if nobody has changed it since; None for a person."""
        text, by = self._by.get(self.keys[index], (None, None))
        return by if text == self[index] and by != "a person" else None

    def to_caption(self, overwrite: Overwrite) -> list[int]:
        """The images to make captions for: those without one, those of captioners, or all but those with several."""
        wanted = {
            "never": lambda i: not self[i],
            "made": lambda i: not self[i] or self.made_by(i),
            "all": lambda i: not self.several(i),
        }[overwrite]
        return [index for index in range(len(self.keys)) if wanted(index)]

    def write(self, texts: Mapping[int, str], by: str) -> list[str]:
        """Write captions to the .txt files beside the images. The texts that they replace are recorded first, as they
        were. Returns the images whose caption somebody has changed since it was read, which keep it.

        Raises UserError for an empty text and one that is no Unicode, and if a file cannot be written.
        """
        rows, changed = [], []
        for index, text in texts.items():
            key, text = self.keys[index], " ".join(text.split())
            if not text or not is_unicode(text):
                raise UserError(f"{self.root / key}: would get a caption that is empty, or no Unicode")
            file = self._file(key)
            try:
                before = read_text(file) or ""
            except ValueError:  # it was written meanwhile, and is no text
                before = "?"
            if before and " ".join(before.split()) != self[index]:
                changed.append(key)
                continue
            row = {"file": key, "text": text, "by": by}
            rows.append((file, row | ({"before": before or self[index]} if self[index] else {})))
        try:
            with (self.root / OWN_RECORD).open("a", encoding="utf-8") as record:
                record.writelines(json.dumps(row) + "\n" for _, row in rows)
            for file, row in rows:
                partial = file.with_name(f".sdft_{os.getpid()}.partial")  # short: names may be as long as can be
                partial.write_text(row["text"] + "\n", encoding="utf-8")
                partial.replace(file)
                self._by[row["file"]] = (row["text"], by)
        except OSError as error:
            raise UserError(f"{self.root}: captions cannot be written ({error.strerror}); check permissions") from error
        return changed

    def _file(self, key: str) -> Path:
        """The caption file of an image: the one that is read for it and no other image, or a new one."""
        image, shared = self.root / key, key in self._sharing
        whole = [image.with_name(image.name + suffix) for suffix in SUFFIXES]
        stem = [image.with_suffix(suffix) for suffix in SUFFIXES]
        candidates = whole if shared else [*whole, *stem]
        return next((file for file in candidates if os.path.isfile(file)), whole[0] if shared else stem[0])

    def corrections(self, file: Path) -> dict[int, str]:
        """The captions in a file that the page has exported, which change what is here.

        Raises UserError for files of another kind, and for images that are not here or whose caption has changed since.
        """
        found, wrong = {}, []
        place = {key: index for index, key in enumerate(self.keys)}
        for key, correction in read_corrections(file).items():
            if key not in place:
                wrong.append(f"{key} is not in {self.root}")
            elif self.several(place[key]):
                wrong.append(f"{key} has several captions")
            elif self[place[key]] not in (correction.before, correction.text):
                wrong.append(f"{key} has another caption now than when the page was written ({self[place[key]]!r})")
            elif self[place[key]] != correction.text:
                found[place[key]] = correction.text
        if wrong:
            raise UserError(f"corrections={file}: {join_problems(wrong)}; write the page again, nothing was changed")
        return found


def is_unicode(text: str) -> bool:
    """Whether a text can be written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_corrections(file: Path) -> dict[str, Correction]:
    """Key -> correction, of an exported file."""
    try:
        content = json.loads(file.expanduser().read_text(encoding="utf-8"))
        if content["kind"] != KIND:
            raise ValueError
        rows = {key: Correction(row["before"], row["text"]) for key, row in content["captions"].items()}
        if not all(isinstance(text, str) for row in rows.values() for text in (row.before, row.text)):
            raise ValueError
    except OSError as error:
        raise UserError(f"corrections={file}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"corrections={file}: is no file that the page of captions has exported") from error
    if empty := [key for key, row in rows.items() if not row.text.strip() or not is_unicode(row.text)]:
        raise UserError(f"corrections={file}: {join_problems(empty)} would get an empty caption, or one of no letters")
    return {key: Correction(row.before, " ".join(row.text.split())) for key, row in rows.items()}
