"""Contact sheets: thumbnails with the crop that is trained on, key, size and caption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from sdft.data.images import CropPlan
from sdft.data.packed_strings import printable
from sdft.pages.lettering import Lettering, broken

CELL, GAP, TEXT_LINES, COLUMNS, MOST = 220, 12, 4, 6, 48
ASCENT = 12
"""From the top of a line to the foot of its letters, in pixels."""
INK, PAPER, FRAME = (40, 40, 46), (252, 252, 253), (230, 30, 60)


class ContactSheet:
    """The first images of one training size, the crop framed and the rest faded, the caption below."""

    def __init__(self) -> None:
        self.cells: list[tuple[Image.Image, str, str]] = []

    def add(self, image_HWC: np.ndarray, plan: CropPlan, key: str, caption: str) -> None:
        """Add an image, up to MOST of them; the rest is ignored."""
        if len(self.cells) == MOST:
            return
        h, w = image_HWC.shape[:2]
        scale = CELL / max(h, w)
        thumb = Image.fromarray(image_HWC).resize((max(1, round(w * scale)), max(1, round(h * scale))))
        grow = thumb.height / plan.resized_hw[0]
        left, top = round(plan.left * grow), round(plan.top * grow)
        right, bottom = left + round(plan.target_hw[1] * grow) - 1, top + round(plan.target_hw[0] * grow) - 1
        box = (left, top, max(left, min(right, thumb.width - 1)), max(top, min(bottom, thumb.height - 1)))
        shown = Image.blend(thumb, Image.new("RGB", thumb.size, PAPER), 0.6)
        shown.paste(thumb.crop((box[0], box[1], box[2] + 1, box[3] + 1)), box[:2])
        ImageDraw.Draw(shown).rectangle(box, outline=FRAME, width=2)
        self.cells.append((shown, f"{key}  {w}x{h}", caption))

    def save(self, path: Path, title: str) -> None:
        """Write the sheet as PNG."""
        font = Lettering(13)
        line = 16
        tallest = max(thumb.height for thumb, _, _ in self.cells)
        height = tallest + (TEXT_LINES + 1) * line + GAP
        columns = min(COLUMNS, len(self.cells))
        num_rows = -(-len(self.cells) // columns)
        size = (columns * (CELL + GAP) + GAP, num_rows * (height + GAP) + GAP + 2 * line)
        sheet = Image.new("RGB", size, PAPER)
        draw = ImageDraw.Draw(sheet)
        font.draw(draw, (GAP, GAP + ASCENT), title, INK)
        for place, (thumb, key, caption) in enumerate(self.cells):
            row, column = divmod(place, columns)
            x, y = GAP + column * (CELL + GAP), GAP + 2 * line + row * (height + GAP)
            sheet.paste(thumb, (x + (CELL - thumb.width) // 2, y + tallest - thumb.height))
            font.draw(draw, (x, y + tallest + 2 + ASCENT), fitted(printable(key), font), FRAME)
            for number, text in enumerate(wrapped(caption, font)):
                font.draw(draw, (x, y + tallest + 2 + ASCENT + (number + 1) * line), text, INK)
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)


def fitted(text: str, font) -> str:
    """The text, its start replaced by an ellipsis if it is wider than a cell."""
    if font.getlength(text) <= CELL:
        return text
    while text and font.getlength("…" + text) > CELL:
        text = text[1:]
    return "…" + text


def wrapped(text: str, font) -> list[str]:
    """The text wrapped to the width of a cell, with an ellipsis after TEXT_LINES lines."""
    lines = [""]
    for word in (piece for whole in text.split() for piece in broken(whole, font, CELL)):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= CELL or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines if len(lines) <= TEXT_LINES else [*lines[: TEXT_LINES - 1], lines[TEXT_LINES - 1] + " …"]
