"""Two looks as of things that are printed: `brand`, flat stickers in five colours, and `ink`, a brush on paper.

Knows how outlines, washes and borders are made. Must not know captions, sampling or what any subject is made of.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sdft.data.toy.geometry import Part
from sdft.data.toy.layout import Layout
from sdft.data.toy.palettes import LUMA, Palette, natural_palette
from sdft.data.toy.rasterize import canvas_side, draw_line, draw_part, reduced, shifted, softened, stage
from sdft.data.toy.scenes import Scene

CREAM, CORAL, NAVY, MINT, MUSTARD = (
    np.array(rgb, dtype=np.float64)
    for rgb in ((252, 243, 224), (240, 96, 80), (30, 44, 88), (122, 200, 182), (246, 188, 66))
)
_PAPER, _INK, _SEAL = np.array([243.0, 236.0, 220.0]), np.array([34.0, 31.0, 38.0]), np.array([196.0, 52.0, 44.0])


def _branded(rgb: np.ndarray) -> np.ndarray:
    """The one of the five colours that stands for a colour: by hue, or by lightness where there is little of it."""
    luma, spread = float(rgb @ LUMA), float(rgb.max() - rgb.min())
    if spread < 60:
        return NAVY if luma < 120 else CREAM
    red, green, blue = rgb
    if red >= max(green, blue):
        return MUSTARD if green > 0.62 * red and green > blue else CORAL
    return MINT if green >= blue or luma > 130 else NAVY


def _ground(rgb: np.ndarray) -> np.ndarray:
    """What lies behind: three tones."""
    luma = float(rgb @ LUMA)
    return NAVY * 0.85 + MINT * 0.15 if luma < 75 else MINT if luma < 165 else CREAM * 0.85 + MINT * 0.15


def brand(scene: Scene, layout: Layout, size: int) -> np.ndarray:
    """The layout in five flat colours, the subjects with a white border like a sticker (float, 0 to 255)."""
    palette = natural_palette(scene)
    flat: Palette = {role: _branded(rgb) for role, rgb in palette.items()}
    for part in layout.back:
        flat[part.role] = _ground(palette[part.role])
    for band in layout.bands:
        flat[band.upper] = flat[band.lower] = _ground((palette[band.upper] + palette[band.lower]) / 2)
    shown, unit = stage(layout, flat, size), size / 64
    border = _grown(shown.mask, 1.5 * unit)
    step = max(1, round(1.5 * unit))
    shadow = shifted(border, step, step)[..., None]
    border, mask = border[..., None], shown.mask[..., None]
    behind = shown.back + (NAVY - shown.back) * 0.55 * shadow
    behind = behind + (255.0 - behind) * border
    return softened(shown.subject + behind * (1 - mask), 0.4 * unit)


def _grown(mask: np.ndarray, radius: float) -> np.ndarray:
    """The mask with a border of this radius."""
    wide = softened(mask * 255.0, radius)
    return np.clip((wide / 255.0 - 0.08) * 6.0, 0, 1)


def _lines(layout: Layout, size: int) -> np.ndarray:
    """How much ink the outlines leave; nearer parts hide the lines of farther ones."""
    image = Image.new("L", (canvas_side(size),) * 2)
    draw, canvas, unit = ImageDraw.Draw(image), image.width, image.width / 64
    for band in layout.bands[1:]:
        draw_line(draw, np.array([[-0.1, band.top], [1.1, band.top]]) * canvas, 0.7 * unit, 120)
    for parts, width, dark in ((layout.back, 0.7, 120), (layout.subject, 1.15, 255)):
        for part in parts:
            if part.edge:
                draw_part(draw, part, canvas, 0)
                _outline(draw, part, canvas, width * unit, dark)
            elif part.role == "ink":
                draw_part(draw, part, canvas, dark)
    for part in layout.front:
        draw_part(draw, part, canvas, 90 if part.width else 0)
    return reduced(image.filter(ImageFilter.GaussianBlur(0.2 * unit)), size)[..., None] / 255.0


def _outline(draw: ImageDraw.ImageDraw, part: Part, canvas: int, width: float, dark: int) -> None:
    points = part.points * canvas
    if part.width:
        draw_line(draw, points, part.width * canvas, dark)
        draw_line(draw, points, max(1.0, part.width * canvas - 1.6 * width), 0)
    else:
        draw_line(draw, np.concatenate([points, points[:1]]), width, dark)


def ink_wash(scene: Scene, layout: Layout, size: int) -> np.ndarray:
    """The layout as ink on paper: outlines, a grey wash and a red seal (float, 0 to 255)."""
    shown, unit = stage(layout, natural_palette(scene), size), size / 64
    mask = shown.mask[..., None]
    tone = (shown.full @ LUMA)[..., None] / 255.0
    soft = softened(tone[..., 0] * 255.0, 1.6 * unit)[..., None] / 255.0
    wash = mask * (0.55 * tone + 0.45 * soft) + (1 - mask) * (0.5 + 0.5 * soft)
    dark = np.clip(1.0 - wash, 0, 1) ** 1.2
    image = _PAPER + (_INK - _PAPER) * (0.62 * dark)
    image = image + (_INK - image) * 0.92 * _lines(layout, size)
    axis = (np.arange(size) + 0.5) / size
    seal = np.clip((0.036 - np.abs(axis - 0.925)) * size + 0.5, 0, 1)
    image = image + (_SEAL - image) * 0.9 * (seal[:, None] * seal[None, :])[..., None]
    return softened(image, 0.4 * unit)
