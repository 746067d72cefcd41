"""Rasterizes a layout: from parts in the unit square and a palette to anti-aliased pixel fields.

Knows supersampling and Pillow. Must not know scenes, captions or looks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sdft.data.toy import patterns
from sdft.data.toy.geometry import Part
from sdft.data.toy.layout import Band, Layout
from sdft.data.toy.palettes import Palette

CANVAS = 256
"""Least side of what is drawn: small pictures are drawn larger, and reduced."""


def canvas_side(size: int) -> int:
    """The side of the canvas of a picture of this size: at least twice that."""
    return size * max(2, CANVAS // size)


@dataclass(frozen=True)
class Stage:
    """Float fields of one painted layout: the full picture, only what lies behind, and the subject's coverage."""

    full: np.ndarray
    back: np.ndarray
    mask: np.ndarray

    @property
    def subject(self) -> np.ndarray:
        """The subject alone, multiplied by its coverage."""
        return self.full - self.back * (1.0 - self.mask[..., None])


def softened(field: np.ndarray, radius: float) -> np.ndarray:
    """The field (0 to 255, one or three channels) under a Gaussian blur."""
    image = Image.fromarray(np.clip(np.rint(field), 0, 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float64)


def shifted(field: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """The field (H x W) moved to the right and down; its edge fills the gap."""
    pad = max(abs(dx), abs(dy))
    height, width = field.shape
    return np.pad(field, pad, mode="edge")[pad - dy:pad - dy + height, pad - dx:pad - dx + width]


def ink(rgb: np.ndarray) -> tuple[int, int, int]:
    """A Pillow colour."""
    red, green, blue = (int(min(255, max(0, round(float(value))))) for value in rgb)
    return red, green, blue


def draw_line(draw: ImageDraw.ImageDraw, points: np.ndarray, width: float, fill: tuple[int, int, int] | int) -> None:
    """A line with round ends, in canvas coordinates."""
    thick = max(1, round(width))
    draw.line(points.ravel().tolist(), fill=fill, width=thick, joint="curve")
    r = thick / 2 - 0.5
    for x, y in (points[0], points[-1]):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def draw_part(draw: ImageDraw.ImageDraw, part: Part, canvas: int, fill: tuple[int, int, int] | int) -> None:
    """One part, scaled from the unit square to the canvas."""
    points = part.points * canvas
    if part.width:
        draw_line(draw, points, part.width * canvas, fill)
    else:
        draw.polygon(points.ravel().tolist(), fill=fill)


def paint(image: Image.Image, parts: Iterable[Part], palette: Palette) -> None:
    """All parts onto an RGB canvas, in order."""
    draw = ImageDraw.Draw(image)
    for part in parts:
        draw_part(draw, part, image.width, ink(palette[part.role]))
        if part.pattern:
            _cover(image, part, palette)


def _cover(image: Image.Image, part: Part, palette: Palette) -> None:
    """The pattern of a part over its colour."""
    canvas = image.width
    left, top = (max(0, int(low)) for low in np.floor(part.points.min(axis=0) * canvas))
    right, bottom = (min(canvas, int(high) + 1) for high in np.ceil(part.points.max(axis=0) * canvas))
    if right <= left or bottom <= top:
        return
    mask = Image.new("L", (right - left, bottom - top), 0)
    ImageDraw.Draw(mask).polygon((part.points * canvas - (left, top)).ravel().tolist(), fill=255)
    share = patterns.share(part.pattern, left, top, right - left, bottom - top, canvas)
    covered = Image.fromarray((np.asarray(mask, dtype=np.float64) * share).astype(np.uint8))
    image.paste(ink(palette[patterns.second_role(part.role, part.pattern)]), (left, top), covered)


def backdrop(bands: tuple[Band, ...], palette: Palette, canvas: int) -> Image.Image:
    """An RGB canvas filled with the bands' vertical gradients."""
    y = (np.arange(canvas) + 0.5) / canvas
    column = np.zeros((canvas, 3))
    for band in bands:
        rows = (y >= band.top) & (y <= band.bottom + 1.0 / canvas)
        share = ((y[rows] - band.top) / (band.bottom - band.top)).clip(0, 1)[:, None]
        column[rows] = palette[band.upper] * (1 - share) + palette[band.lower] * share
    strip = np.clip(np.rint(column), 0, 255).astype(np.uint8)[:, None, :]
    return Image.fromarray(strip).resize((canvas, canvas))


def reduced(image: Image.Image, size: int) -> np.ndarray:
    """The canvas averaged down to picture size, as floats."""
    return np.asarray(image.reduce(image.width // size), dtype=np.float64)


def coverage(layout: Layout, size: int) -> np.ndarray:
    """How much of each pixel the subject covers, 0 to 1."""
    image = Image.new("L", (canvas_side(size),) * 2, 0)
    draw = ImageDraw.Draw(image)
    for parts, value in ((layout.subject, 255), (layout.front, 0)):
        for part in parts:
            draw_part(draw, part, image.width, value)
    return reduced(image, size) / 255.0


def stage(layout: Layout, palette: Palette, size: int) -> Stage:
    """The layout painted in flat colours over its gradients."""
    image = backdrop(layout.bands, palette, canvas_side(size))
    paint(image, layout.back, palette)
    bare = image.copy()
    paint(bare, layout.front, palette)
    back = reduced(bare, size)
    paint(image, layout.subject, palette)
    paint(image, layout.front, palette)
    return Stage(reduced(image, size), back, coverage(layout, size))
