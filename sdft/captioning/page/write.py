"""Writes the page of captions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from sdft.captioning.caption_files import CaptionFiles
from sdft.data.packed_strings import printable
from sdft.data.threads import in_threads
from sdft.errors import UserError
from sdft.pages import html

HERE = Path(__file__).parent
LONGEST = 320
MAX_TOTAL_PIXELS = 70_000_000
"""Of all thumbnails: they get smaller with more than 700 images, so that a page stays at about 40 MB."""


def write_page(path: Path, files: CaptionFiles, bar: Callable[[Iterable], Iterable] = iter) -> int:
    """Write the page of a folder, and return its number of images. Images that cannot be decoded are left out."""
    side = max(48, min(LONGEST, math.isqrt(MAX_TOTAL_PIXELS // max(1, len(files.keys)))))

    def item(index: int) -> dict | None:
        try:
            picture = Image.fromarray(files.source.stored(index).pixels())
        except UserError:
            return None
        key, by = files.keys[index], files.made_by(index)
        several = files.several(index)
        return None if several else {
            "key": printable(key), "text": files[index], "by": by, "picture": html.thumbnail(picture, side)
        }  # fmt: skip

    items = [found for found in bar(in_threads(item, range(len(files.keys)))) if found]
    content = [[item["key"], item["text"]] for item in items]
    name = hashlib.sha256(html.json_text([str(files.root), content]).encode()).hexdigest()[:16]
    data = {"id": name, "folder": printable(str(files.root)), "items": items}
    path.parent.mkdir(parents=True, exist_ok=True)
    html.write_whole(path, html.page(HERE, "captions", "Captions", ("captions",), data))
    return len(items)
