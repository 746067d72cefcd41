"""Writes the page of captions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

from sdft.captioning.caption_files import CaptionFiles
from sdft.data.packed_strings import printable
from sdft.data.threads import in_threads
from sdft.errors import UserError
from sdft.pages import html

HERE = Path(__file__).parent
LEAST, LONGEST = 48, 320
"""Sides of thumbnails in pixels."""


def write_page(path: Path, files: CaptionFiles, bar: Callable[[Iterable], Iterable] = iter) -> int:
    """Write the page of a folder, and return its number of images. Images that cannot be decoded are left out."""
    side = max(LEAST, html.thumbnail_side(len(files.keys), LONGEST))

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
    name = html.storage_key([printable(str(files.root)), content])
    data = {"id": name, "folder": printable(str(files.root)), "items": items}
    path.parent.mkdir(parents=True, exist_ok=True)
    html.write_whole(path, html.page(HERE, "captions", "Captions", ("captions",), data))
    return len(items)
