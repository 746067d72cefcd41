"""Geometry of a whole picture: bands of sky and land, things behind the subject, the subject, things before it.

Knows where every part lies in the unit square (y down). Must not know colours, looks or pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sdft.data.toy.attachments import SEATS
from sdft.data.toy.geometry import OTHER, OWN_ROLES, Part, blob, bounds, curve, moved, oval, rect, stroke
from sdft.data.toy.landmarks import cactus, detailed_parts
from sdft.data.toy.scenes import WIDE_SUBJECTS, Scene

DETAIL_STREAM, RAIN_STREAM = 1, 4
_SOLID_PLACES = frozenset({"grass", "table", "snow", "desert", "road"})
_FLOATING = frozenset({"star", "fish", "butterfly", "hot air balloon", "rocket"})

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in the unit square."""


@dataclass(frozen=True)
class Band:
    """A horizontal band that blends from one role at its top to another at its bottom."""

    top: float
    bottom: float
    upper: str
    lower: str


@dataclass(frozen=True)
class Layout:
    """A picture as geometry; `box` bounds all subjects, `boxes` each of them, the farther one first, and `resting`
    those that stand on something."""

    bands: tuple[Band, ...]
    back: tuple[Part, ...]
    subject: tuple[Part, ...]
    front: tuple[Part, ...]
    box: Box
    resting: tuple[Box, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class _Place:
    """Where a drawing goes: `free` centres it at `y`, otherwise its base is there."""

    x: float
    y: float
    size: float
    flip: bool
    free: bool
    widest: float = 0.94

    def shift(self, parts: Sequence[Part]) -> tuple[float, float, float]:
        """The scale and the shift of the drawing, for `moved`."""
        x0, y0, x1, y1 = bounds(parts)
        width, height = x1 - x0, y1 - y0
        scale = min(self.size / max(height, 0.8 * width), self.widest / width)
        half = scale * width / 2 + 0.02
        centre = float(np.clip(self.x, half, 1.0 - half))
        middle = float(np.clip(self.y, scale * height / 2 + 0.02, 0.98 - scale * height / 2)) if self.free else 0.0
        dy = middle - scale * (y0 + y1) / 2 if self.free else self.y - scale * y1
        return scale, centre + (scale if self.flip else -scale) * (x0 + x1) / 2, dy


def _wide(parts: Sequence[Part], subject: str, scene: Scene, x: float, y: float, size: float) -> list[Part]:
    """A forest or a mountain, which fill the picture from side to side."""
    if subject == "fairy tale forest":
        return moved(parts, 0.01, x - 0.5, y - 0.70)
    x0, _, x1, y1 = bounds(parts)
    scale = size / 100.0
    return moved(parts, scale, x - scale * (x0 + x1) / 2, scene.horizon + 0.06 - scale * y1)


def _subjects(scene: Scene) -> tuple[list[list[Part]], tuple[Box, ...]]:
    """The parts of each subject, the farther one first, and the boxes of those that stand on something."""
    variant, in_sky = scene.index * 7 + scene.seed, scene.place == "sky"
    flies = in_sky or scene.pose == "flying"
    parts = _covered(detailed_parts(scene.subject, variant, flies, scene.pose, scene.worn), scene.finish)
    if scene.other is not None:
        return _pair(scene, parts)
    if scene.subject in WIDE_SUBJECTS:
        return [_wide(parts, scene.subject, scene, scene.x, scene.y, scene.size)], ()
    free = scene.place in ("studio", "sky", "underwater")
    leaps = scene.pose == "jumping"
    place = _Place(scene.x, scene.y - 0.07 * leaps, scene.size, scene.flip, free)
    drawn = moved(parts, *place.shift(parts), scene.flip)
    stands = scene.place in _SOLID_PLACES or (scene.place == "studio" and scene.subject not in _FLOATING)
    x0, y0, x1, y1 = bounds(drawn)
    return [drawn], ((x0, y0, x1, y1 + 0.07 * leaps),) if stands else ()  # its shadow stays on the ground


def _pair(scene: Scene, parts: list[Part]) -> tuple[list[list[Part]], tuple[Box, ...]]:
    other = scene.other
    assert other is not None
    others = _covered(detailed_parts(other.subject, scene.index * 7 + scene.seed, False), other.finish, OTHER)
    beside = scene.relation == "beside"
    widest = 0.46 if beside else 0.94
    if other.subject in WIDE_SUBJECTS:
        far, carried = _wide(others, other.subject, scene, other.x, other.y, other.size), None
    else:
        shift = _Place(other.x, other.y, other.size, other.flip, False, widest).shift(others)
        far, carried = moved(others, *shift, other.flip), SEATS.get(other.subject)
    if scene.relation == "on":
        assert carried is not None
        scale, dx, dy = shift
        x, y = dx + (-scale if other.flip else scale) * carried[0], dy + scale * carried[1] + 0.012
        place = _Place(x, y, scene.size, scene.flip, False)
    else:
        place = _Place(scene.x, scene.y, scene.size, scene.flip, scene.relation == "above", widest if beside else 0.5)
    near = moved(parts, *place.shift(parts), scene.flip)
    held = other.subject == "umbrella" and scene.relation == "under"
    standing = [] if held or other.subject in WIDE_SUBJECTS else [bounds(far)]
    standing += [bounds(near)] if scene.relation in ("beside", "before", "under") else []
    on_solid = scene.place in _SOLID_PLACES or scene.place == "studio"
    return [far, near], tuple(standing) if on_solid else ()


def _covered(parts: Sequence[Part], finish: str, prefix: str = "") -> list[Part]:
    """The parts with the material or the pattern, and with the roles of the second subject."""
    if finish:
        parts = [replace(part, pattern=finish) if part.role == "main" and not part.width else part for part in parts]
    if prefix:
        parts = [replace(part, role=prefix + part.role) if part.role in OWN_ROLES else part for part in parts]
    return list(parts)


def _cloud(x: float, y: float, s: float) -> list[Part]:
    outline = [(-1.0, 0.25), (-0.95, -0.05), (-0.6, -0.2), (-0.35, -0.5), (0.1, -0.55), (0.4, -0.25), (0.8, -0.2),
               (1.0, 0.1), (0.9, 0.3), (0.0, 0.33)]
    return moved([blob("cloud", outline)], s, x, y)


def _heavens(scene: Scene, rng: np.random.Generator) -> list[Part]:
    """Sun, moon, stars and clouds above the land, on the side the subject leaves free."""
    left = rng.random() < 0.5 if abs(scene.x - 0.5) < 0.1 else scene.x > 0.5
    reach = 0.36 if "fairy tale forest" in (scene.subject, scene.other and scene.other.subject) else 0.13
    x = reach + 0.04 * rng.random() if left else 1.0 - reach - 0.04 * rng.random()
    parts: list[Part] = []
    if scene.time == "night":
        for sx, sy in ((0.12, 0.36), (0.36, 0.10), (0.62, 0.07), (0.90, 0.40), (0.5, 0.26)):
            parts.append(oval("starlight", sx + rng.uniform(-0.06, 0.06), sy + rng.uniform(-0.04, 0.04), 0.014, 0.014,
                              edge=False))
        return [*parts, oval("moon", x, 0.13, 0.085, 0.085), oval("moonspot", x - 0.025, 0.11, 0.022, 0.022,
            edge=False),
                oval("moonspot", x + 0.03, 0.155, 0.016, 0.016, edge=False)]
    if scene.time == "sunset":
        height = 0.5 if scene.place == "sky" else scene.horizon
        return [oval("sun", x, height - 0.03, 0.13, 0.13), *_cloud(1 - x, 0.14, 0.15)]
    if scene.time == "sunny":
        parts.append(oval("sun", x, 0.13, 0.09, 0.09))
        return parts + _cloud(1.0 - x + rng.uniform(-0.05, 0.05), 0.16 + rng.uniform(-0.04, 0.04), 0.15)
    if scene.time == "fog":
        return []
    parts += _cloud(x, 0.16 + rng.uniform(-0.04, 0.06), 0.15 + 0.05 * rng.random())
    return parts + _cloud(1.0 - x + rng.uniform(-0.06, 0.06), 0.12 + rng.uniform(-0.04, 0.04), 0.13)


def _sea(horizon: float, rng: np.random.Generator) -> list[Part]:
    parts = []
    for row, y in enumerate(np.arange(horizon + 0.07, 1.0, 0.1)):
        shift = rng.uniform(-0.1, 0.1)
        for x in (0.18, 0.74) if row % 2 else (0.04, 0.48, 0.92):
            a = x + shift
            parts.append(curve("wave", [(a - 0.09, y), (a - 0.04, y - 0.012), (a + 0.04, y + 0.012), (a + 0.09, y)],
                0.018,
                               False))
    return parts


def _land(scene: Scene, rng: np.random.Generator) -> list[Part]:
    horizon, shift = scene.horizon, rng.uniform(-0.2, 0.2)
    if scene.place == "sea":
        return _sea(horizon, rng)
    if scene.place == "road":
        dashes = [rect("dash", x, 0.83, x + 0.16, 0.86, False) for x in np.arange(shift - 0.2, 1.0, 0.3)]
        return [rect("road", -0.1, 0.72, 1.1, 0.97), *dashes]
    low, high = (0.03, 0.10) if scene.place != "desert" else (0.02, 0.08)
    hill = [(-0.3, 1.2), (-0.3, horizon + low), (0.15 + shift, horizon - high), (0.55 + shift, horizon + low),
            (0.9 + shift, horizon - high * 0.6), (1.3, horizon + low), (1.3, 1.2)]
    parts = [blob("hill", hill)]
    if scene.place == "desert":
        x = 0.12 if scene.x >= 0.5 else 0.88
        parts += moved(cactus(), 0.006, x, horizon + 0.06)
    if scene.place == "snow":
        for fx, fy in ((0.10, 0.50), (0.30, 0.34), (0.70, 0.30), (0.92, 0.56), (0.50, 0.12), (0.24, 0.74),
            (0.80, 0.78)):
            parts.append(oval("flake", fx + rng.uniform(-0.07, 0.07), fy + rng.uniform(-0.05, 0.05), 0.019, 0.019,
                              edge=False))
    return parts


def _underwater(rng: np.random.Generator) -> tuple[tuple[Band, ...], list[Part]]:
    parts: list[Part] = [blob("seabed", [(-0.3, 1.2), (-0.2, 0.92), (0.25, 0.85), (0.6, 0.91), (0.9, 0.86), (1.2, 0.9),
                                         (1.3, 1.2)])]
    for x in (0.10, 0.90):
        a = x + rng.uniform(-0.05, 0.05)
        parts.append(curve("weed", [(a, 0.94), (a - 0.03, 0.82), (a + 0.03, 0.72), (a, 0.60)], 0.035, False))
    for x, y, r in ((0.16, 0.30, 0.03), (0.24, 0.16, 0.022), (0.82, 0.20, 0.028)):
        parts.append(oval("bubble", x + rng.uniform(-0.05, 0.05), y, r, r))
    return (Band(0.0, 1.0, "water_top", "water_deep"),), parts


def _rain(scene: Scene) -> list[Part]:
    rng = np.random.default_rng(np.random.SeedSequence([scene.seed, scene.index, RAIN_STREAM]))
    drops = rng.uniform(0.0, 1.0, (22, 2))
    return [stroke("drop", [(x, y), (x - 0.018, y + 0.065)], 0.009, False) for x, y in drops]


def _swell(scene: Scene, box: Box) -> list[Part]:
    if scene.place != "sea" or scene.subject == "mountain":
        return []
    x0, _, x1, y1 = box
    rim = y1 - 0.055
    crest = [(x0 - 0.1, rim + 0.02)]
    crest += [(x0 + (x1 - x0) * t, rim + (0.016 if k % 2 else -0.016)) for k, t in enumerate(np.linspace(0.0, 1.0, 6))]
    crest += [(x1 + 0.1, rim + 0.02), (x1 + 0.06, y1 + 0.03), (x0 - 0.06, y1 + 0.03)]
    return [blob("swell", crest, False), curve("wave", crest[:-2], 0.018, False)]


def lay_out(scene: Scene) -> Layout:
    """Where everything in the scene lies; the same for every look."""
    rng = np.random.default_rng(np.random.SeedSequence([scene.seed, scene.index, DETAIL_STREAM]))
    subjects, resting = _subjects(scene)
    subject = [part for parts in subjects for part in parts]
    box = bounds(subject)
    place, horizon = scene.place, scene.horizon
    bands: tuple[Band, ...]
    if place == "studio":
        bands, back = (Band(0.0, 1.0, "wall_top", "wall_low"),), []
    elif place == "table":
        edge = horizon + 0.08
        bands = (Band(0.0, edge, "wall_top", "wall_low"), Band(edge, 1.0, "table_far", "table_near"))
        back = [stroke("table_rim", [(-0.1, edge), (1.1, edge)], 0.025)]
    elif place == "underwater":
        bands, back = _underwater(rng)
    elif place == "sky":
        bands = (Band(0.0, 1.0, "sky_top", "sky_low"),)
        low = [] if scene.time == "night" else _cloud(rng.uniform(0.15, 0.85), 0.93, 0.24)
        back = _heavens(scene, rng) + low
    else:
        bands = (Band(0.0, horizon, "sky_top", "sky_low"), Band(horizon, 1.0, "land_far", "land_near"))
        back = _heavens(scene, rng) + _land(scene, rng)
    front = _swell(scene, box) + (_rain(scene) if scene.time == "rain" else [])
    return Layout(bands, tuple(back), tuple(subject), tuple(front), box, resting, tuple(map(bounds, subjects)))
