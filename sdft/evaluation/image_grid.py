"""Grids of images with labels, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sdft.pages.lettering import Lettering, broken

GAP = 4
INK, PAPER = (40, 40, 46), (252, 252, 253)
BAR = (228, 228, 232)
"""Fills the place of an image that is smaller than others of its grid."""


def grid(
    rows: Sequence[np.ndarray], labels: Sequence[str] = (), columns: Sequence[str] = (), scale: int = 1
) -> Image.Image:
    """Rows of images (each uint8 RGB, N x H x W x 3), with labels left of each row and above each column.

    scale: integer factor by which images are enlarged, with nearest-neighbour resampling.
    """
    h, w = (side * scale for side in rows[0].shape[1:3])
    points = max(12, h // 9)
    font = Lettering(points)
    margin = max((int(font.getlength(label)) for label in labels), default=-2 * GAP) + 2 * GAP
    wrapped = [_wrap(text, font, w) for text in columns]
    header = max((len(lines) for lines in wrapped), default=0) * int(points * 1.25) + (GAP if columns else 0)
    size = (margin + max(len(row) for row in rows) * (w + GAP) + GAP, header + len(rows) * (h + GAP) + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for c, lines in enumerate(wrapped):
        for number, text in enumerate(lines):
            font.draw(draw, (margin + GAP + c * (w + GAP), GAP + points + number * int(points * 1.25)), text, INK)
    for r, row in enumerate(rows):
        top = header + GAP + r * (h + GAP)
        if labels:
            font.draw(draw, (GAP, top + h // 2), labels[r], INK, anchor="lm")
        for c, image in enumerate(row):
            tile = Image.fromarray(image).resize((w, h), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + GAP + c * (w + GAP), top))
    return sheet


def save_grid(path: Path, rows: Sequence[np.ndarray], labels: Sequence[str] = (), columns: Sequence[str] = ()) -> None:
    """Write a grid as PNG; images smaller than 128 px are enlarged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, labels, columns, scale=max(1, 128 // rows[0].shape[1])).save(path)


def letterboxed(images: Sequence[np.ndarray], hw: tuple[int, int]) -> np.ndarray:
    """Images of any sizes (each uint8 RGB, H x W x 3) in the middle of equal places, N x H x W x 3.

    An image keeps its pixels, enlarged by the largest integer with which it fits.
    """
    places = np.empty((len(images), *hw, 3), np.uint8)
    places[:] = BAR
    for place, image in zip(places, images, strict=True):
        times = min(room // side for room, side in zip(hw, image.shape, strict=False))
        large = image.repeat(times, 0).repeat(times, 1)
        top, left = ((room - side) // 2 for room, side in zip(hw, large.shape, strict=False))
        place[top : top + large.shape[0], left : left + large.shape[1]] = large
    return places


def _wrap(text: str, font, width: int, max_lines: int = 3) -> list[str]:
    lines = [""]
    for word in (piece for whole in text.split() for piece in broken(whole, font, width)):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], lines[max_lines - 1] + "…"]
    return lines
