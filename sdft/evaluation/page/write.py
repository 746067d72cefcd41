"""Writes `report.html`: one file with thumbnails, results as JSON, and the scripts that show them.

All texts of users are embedded as data and never as markup. The layout is in page.html, page.css and the scripts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from sdft.errors import UserError
from sdft.evaluation.results import HeatMap, Results
from sdft.pages import html

HERE = Path(__file__).parent
SCRIPTS = ("plot", "table", "pictures", "grid", "enlarge", "tables", "charts", "bradley_terry", "vote", "page")
"""In the order of their dependencies."""

LONGEST = 256
"""Maximal side of a thumbnail in pixels; the page loads the full file, by its path, when an image is enlarged."""


def write_page(path: Path, results: Results) -> None:
    """Write the page of `results`. Raises UserError for an image that is missing; paths are relative to the page."""
    pictures = [path.parent / picture.path for picture in results.pictures]
    side = html.thumbnail_side(len(pictures), LONGEST)
    # Pillow releases the GIL.
    with ThreadPoolExecutor() as pool:
        thumbnails = list(pool.map(partial(thumbnail, side=side), pictures))
    data = plain(results)
    for picture, small in zip(data["pictures"], thumbnails, strict=True):
        picture["thumbnail"] = small
    data["id"] = html.storage_key(data)
    html.write_whole(path, html.page(HERE, "page", "Comparison", SCRIPTS, data))


def plain(value: Any) -> Any:
    """The value as JSON types. NaN and infinity become null; the cells of a heat map become a list."""
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
    """A thumbnail as WebP in a data URI, at most `side` pixels wide and high, and the size of the original."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: this image is missing; run the comparison again.") from None
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: not a readable image ({error}); delete it and run the comparison again.") from None
    return html.thumbnail(image, side)
