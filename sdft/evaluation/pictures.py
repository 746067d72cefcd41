"""Grids of pictures with labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GAP = 4
INK, PAPER = (40, 40, 46), (252, 252, 253)


def grid(
    rows: Sequence[np.ndarray], labels: Sequence[str] = (), columns: Sequence[str] = (), scale: int = 1
) -> Image.Image:
    """Rows of pictures (each N x H x W x 3 bytes), a label left of each row and above each column.

    scale: how many times larger small pictures are shown; nearest neighbour, so that no pixel is invented.
    """
    h, w = (side * scale for side in rows[0].shape[1:3])
    points = max(12, h // 9)
    font = ImageFont.load_default(points)
    margin = max((int(font.getlength(label)) for label in labels), default=-2 * GAP) + 2 * GAP
    wrapped = [_wrap(text, font, w) for text in columns]
    header = max((len(lines) for lines in wrapped), default=0) * int(points * 1.25) + (GAP if columns else 0)
    size = (margin + max(len(row) for row in rows) * (w + GAP) + GAP, header + len(rows) * (h + GAP) + GAP)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    for c, lines in enumerate(wrapped):
        draw.multiline_text((margin + GAP + c * (w + GAP), GAP), "\n".join(lines), INK, font=font, spacing=1)
    for r, row in enumerate(rows):
        top = header + GAP + r * (h + GAP)
        if labels:
            draw.text((GAP, top + h // 2), labels[r], INK, font=font, anchor="lm")
        for c, picture in enumerate(row):
            tile = Image.fromarray(picture).resize((w, h), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + GAP + c * (w + GAP), top))
    return sheet


def save_grid(path: Path, rows: Sequence[np.ndarray], labels: Sequence[str] = (), columns: Sequence[str] = ()) -> None:
    """Write a grid as PNG, enlarging pictures below 128 px."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, labels, columns, scale=max(1, 128 // rows[0].shape[1])).save(path)


def _wrap(text: str, font, width: int, most: int = 3) -> list[str]:
    lines = [""]
    for word in (piece for whole in text.split() for piece in _broken(whole, font, width)):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + "…"]
    return lines


def _broken(word: str, font, width: int) -> list[str]:
    """A word in pieces, each no wider than `width`."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces
