"""Writes `report.html`: one file with the pictures, the figures and the script that shows them.

Knows the template beside it, Pillow and how to keep text from becoming markup. Must not know how anything was drawn or
measured, nor what the page looks like: that is in page.html, page.css and the scripts.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image, UnidentifiedImageError

from sdft.errors import UserError
from sdft.evaluation.results import HeatMap, Results

HERE = Path(__file__).parent
SCRIPTS = ("elements", "pictures", "grid", "enlarge", "tables", "charts", "bradley_terry", "vote", "page")
"""In the order in which they need each other."""

LONGEST = 256
"""Side of an embedded picture at most, in pixels; the page loads the full file, by its path, when it is enlarged."""
MAX_TOTAL_PIXELS = 70_000_000
"""Of all embedded pictures together. More than 1,068 are embedded smaller, so that a page stays at about 40 MB:
a pixel takes 0.1 to 0.4 bytes in WebP of this quality, and base64 a third more."""
QUALITY = 78
LOSSLESS = 4
"""How many times more a pixel takes without loss: a picture so much smaller than the limit is embedded whole."""


def write_page(path: Path, results: Results) -> None:
    """The page of `results`. Raises UserError for a picture that is not where its path, relative to the page, says."""
    pictures = [path.parent / picture.path for picture in results.pictures]
    side = min(LONGEST, math.isqrt(MAX_TOTAL_PIXELS // max(1, len(pictures))))
    # Pillow works outside of the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        thumbnails = list(pool.map(partial(thumbnail, side=side), pictures))
    data = plain(results)
    for picture, small in zip(data["pictures"], thumbnails, strict=True):
        picture["thumbnail"] = small
    # Votes are kept under this name: the same page opened again finds them, another page does not.
    data["id"] = hashlib.sha256(json_text(data).encode()).hexdigest()[:16]
    unfinished = path.with_name(f"{path.name}.partial")
    unfinished.write_text(page(json_text(data)), encoding="utf-8", newline="\n")
    unfinished.replace(path)


def page(data: str) -> str:
    """The template with style, script and data inside; its policy lets these act, and nothing load from a network."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = "\n".join((HERE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    policy = (
        f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; "
        "img-src 'self' file: data:; base-uri 'none'; form-action 'none'"
    )
    template = Template((HERE / "page.html").read_text(encoding="utf-8"))
    return template.substitute(policy=policy, style=style, script=script, data=data)


def digest(text: str) -> str:
    """How a Content-Security-Policy names an inline element that may act."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def json_text(value: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end the element or begin another."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def plain(value: Any) -> Any:
    """The same in the types of JSON. What is not a finite number becomes null; the cells of a map become a list."""
    if isinstance(value, HeatMap):
        cells = [{"row": row, "column": column, **plain(cell)} for (row, column), cell in value.cells.items()]
        return {"metric": value.metric, "row_name": value.row_name, "column_name": value.column_name, "cells": cells}
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [plain(item) for item in value]


def thumbnail(path: Path, side: int) -> dict[str, Any]:
    """What the page embeds of a picture: WebP as a data URI of at most this side, and the size of the original."""
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            image = opened.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: this picture is missing; compare again to have it drawn.") from None
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: not a picture that can be read ({error}); delete it and compare again.") from None
    whole = width * height * LOSSLESS <= side * side
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=whole, quality=QUALITY, method=4)
    uri = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return {"uri": uri, "width": width, "height": height, "whole": whole}
