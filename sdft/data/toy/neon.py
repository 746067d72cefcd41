"""The technomant look: a dark picture whose shapes and circuit traces glow.

Knows neon rims, traces and glow. Must not know captions, sampling or what any subject is made of.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from sdft.data.toy.geometry import OTHER, Part
from sdft.data.toy.layout import Layout
from sdft.data.toy.palettes import Palette, natural_palette
from sdft.data.toy.rasterize import (
    backdrop,
    canvas_side,
    coverage,
    draw_line,
    draw_part,
    ink,
    paint,
    reduced,
    softened,
)
from sdft.data.toy.scenes import Scene

TRACE_STREAM = 3
CYAN = np.array([40.0, 236.0, 255.0])
MAGENTA = np.array([255.0, 56.0, 210.0])
GREEN = np.array([90.0, 255.0, 130.0])
_TEAL = np.array([10.0, 112.0, 124.0])
_NIGHT = np.array([4.0, 12.0, 22.0])
_MAGENTA_ROLES = frozenset({"dark", "trim", "roof", "core", "brick", "stonedark", "redlamp", "ink", "coffee",
    "wooddark",
                            "orange"})
_GREEN_ROLES = frozenset({"eye", "lamp", "screen", "flame", "yellow", "leaf", "leafdark", "glass", "wood"})
_LINE = 1.6
"""Width of a line in pixels of an image of 64."""


def _neon(role: str) -> np.ndarray:
    role = role.removeprefix(OTHER)
    if role in _MAGENTA_ROLES:
        return MAGENTA
    return GREEN if role in _GREEN_ROLES else CYAN


def _rim(draw: ImageDraw.ImageDraw, part: Part, canvas: int, unit: float, colour: np.ndarray) -> None:
    points = part.points * canvas
    if part.width:
        draw_line(draw, points, _LINE * unit, ink(colour))
    else:
        draw_line(draw, np.concatenate([points, points[:1]]), _LINE * unit, ink(colour))


def _rims(layout: Layout, size: int) -> np.ndarray:
    """Light of the outlines alone; nearer parts hide the lines of farther ones."""
    image = Image.new("RGB", (canvas_side(size),) * 2)
    draw, canvas, unit = ImageDraw.Draw(image), image.width, image.width / 64
    for band in layout.bands[1:]:
        draw_line(draw, np.array([[-0.1, band.top], [1.1, band.top]]) * canvas, _LINE * unit, ink(_TEAL * 1.1))
    for part in layout.back:
        draw_part(draw, part, canvas, (0, 0, 0))
        if part.edge:
            _rim(draw, part, canvas, unit, _TEAL * (1.6 if part.role in ("sun", "moon") else 1.1))
    for part in layout.subject:
        draw_part(draw, part, canvas, (0, 0, 0))
        if part.edge:
            _rim(draw, part, canvas, unit, _neon(part.role))
    for part in layout.front:
        draw_part(draw, part, canvas, ink(_TEAL * 1.2) if part.width else (0, 0, 0))
    return reduced(image, size)


def _traces(scene: Scene, size: int) -> np.ndarray:
    """Brightness (0 to 1) of a few right-angled circuit lines that end in node dots."""
    rng = np.random.default_rng(np.random.SeedSequence([scene.seed, scene.index, TRACE_STREAM]))
    image = Image.new("L", (canvas_side(size),) * 2)
    draw, canvas, unit = ImageDraw.Draw(image), image.width, image.width / 64
    lanes = rng.permutation(np.array([0.08, 0.22, 0.36, 0.66, 0.80, 0.93]))
    for k in range(3):
        start, turn = lanes[k], rng.uniform(0.12, 0.34)
        bend = start + rng.choice((-1.0, 1.0)) * rng.uniform(0.10, 0.20)
        bend = start - (bend - start) if not 0.05 < bend < 0.95 else bend
        path = np.array([[-0.05, start], [turn, start], [turn, bend], [turn + rng.uniform(0.10, 0.24), bend]])
        if k % 2:
            path[:, 0] = 1.0 - path[:, 0]
        if k == 2:
            path = path[:, ::-1].copy()
        draw_line(draw, path * canvas, _LINE * unit, 255)
        x, y = path[-1] * canvas
        r = 2.0 * unit
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    return reduced(image, size)[..., None] / 255.0


def _darkened(palette: Palette, layout: Layout) -> Palette:
    dark = {role: rgb * 0.20 + _NIGHT * 0.8 for role, rgb in palette.items()}
    for part in layout.back:
        dark[part.role] = palette[part.role] * 0.13 + _NIGHT
    for band in layout.bands:
        for role in (band.upper, band.lower):
            dark[role] = palette[role] * np.array([0.05, 0.09, 0.12]) + _NIGHT
    for part in layout.subject:
        dark[part.role] = palette[part.role] * (0.37 if part.edge else 0.40) + _NIGHT * 0.5
    return dark


def technomant(scene: Scene, layout: Layout, size: int) -> np.ndarray:
    """The layout as a dark picture with glowing rims and circuit traces (float, 0 to 255 and above)."""
    palette = _darkened(natural_palette(scene), layout)
    image = backdrop(layout.bands, palette, canvas_side(size))
    for parts in (layout.back, layout.subject, layout.front):
        paint(image, parts, palette)
    base, unit = reduced(image, size), size / 64
    mask = coverage(layout, size)[..., None]
    rims = _rims(layout, size)
    traces = _traces(scene, size) * (_TEAL * (1.0 - mask) + (0.45 * MAGENTA + 0.15 * CYAN) * mask)
    light = softened(np.maximum(rims, traces), 0.4 * unit)
    glow = softened(light, 2.2 * unit) * 0.8 + softened(light, 5.0 * unit) * 0.42
    dim = base * (1.0 - light.max(axis=-1, keepdims=True) / 255.0)
    return softened(255.0 - (255.0 - dim - light.clip(0, 255 - dim)) * (1.0 - glow.clip(0, 255) / 255.0), 0.4 * unit)
