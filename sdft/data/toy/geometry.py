"""Vector parts: the few primitives from which every drawing of the toy world is made.

Knows points, roles and line widths. Must not know colours, looks, scenes or pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

Points = Sequence[tuple[float, float]]
OWN_ROLES = frozenset({"main", "dark", "light", "trim", "roof", "spot", "core"})
"""The roles whose colours depend on that of the subject."""
OTHER = "other:"
"""Before those roles, where they are the second subject's."""


@dataclass(frozen=True)
class Part:
    """One filled outline (width 0) or one stroke (width > 0).

    role: names its colour in a palette. edge: whether the technomant look outlines it. pattern: of the filled outline,
    one of `sdft.data.toy.patterns`.
    """

    points: np.ndarray
    role: str
    width: float = 0.0
    edge: bool = True
    pattern: str = ""


def poly(role: str, points: Points, edge: bool = True) -> Part:
    """A filled polygon."""
    return Part(np.asarray(points, dtype=np.float64), role, 0.0, edge)


def rect(role: str, x0: float, y0: float, x1: float, y1: float, edge: bool = True) -> Part:
    """An upright rectangle."""
    return poly(role, [(x0, y0), (x1, y0), (x1, y1), (x0, y1)], edge)


def oval(role: str, cx: float, cy: float, rx: float, ry: float, turn: float = 0.0, edge: bool = True) -> Part:
    """An ellipse turned clockwise by `turn` degrees."""
    angle = np.linspace(0.0, 2.0 * np.pi, 28, endpoint=False)
    x, y = rx * np.cos(angle), ry * np.sin(angle)
    c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    return Part(np.stack([cx + c * x - s * y, cy + s * x + c * y], axis=1), role, 0.0, edge)


def slab(role: str, x0: float, y0: float, x1: float, y1: float, radius: float, edge: bool = True) -> Part:
    """A rectangle with round corners."""
    corners = ((x1 - radius, y1 - radius), (x0 + radius, y1 - radius), (x0 + radius, y0 + radius),
               (x1 - radius, y0 + radius))
    points = []
    for quarter, (cx, cy) in enumerate(corners):
        for angle in np.radians(90.0 * quarter + np.array([0.0, 30.0, 60.0, 90.0])):
            points.append((cx + radius * np.cos(angle), cy + radius * np.sin(angle)))
    return poly(role, points, edge)


def _spline(points: np.ndarray, closed: bool, steps: int = 6) -> np.ndarray:
    if closed:
        padded = np.concatenate([points[-1:], points, points[:2]])
    else:
        padded = np.concatenate([points[:1], points, points[-1:]])
    p0, p1, p2, p3 = (padded[k:len(padded) - 3 + k, None, :] for k in range(4))
    t = np.linspace(0.0, 1.0, steps, endpoint=False)[None, :, None]
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    flat = curve.reshape(-1, 2)
    return flat if closed else np.concatenate([flat, points[-1:]])


def blob(role: str, points: Points, edge: bool = True) -> Part:
    """A smooth closed shape through the points."""
    return Part(_spline(np.asarray(points, dtype=np.float64), True), role, 0.0, edge)


def stroke(role: str, points: Points, width: float, edge: bool = True) -> Part:
    """A straight-segment line."""
    return Part(np.asarray(points, dtype=np.float64), role, width, edge)


def curve(role: str, points: Points, width: float, edge: bool = True) -> Part:
    """A smooth line through the points."""
    return Part(_spline(np.asarray(points, dtype=np.float64), False), role, width, edge)


def bounds(parts: Iterable[Part]) -> tuple[float, float, float, float]:
    """The box (x0, y0, x1, y1) around all parts, line widths included."""
    low = np.min([part.points.min(axis=0) - part.width / 2 for part in parts], axis=0)
    high = np.max([part.points.max(axis=0) + part.width / 2 for part in parts], axis=0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def moved(parts: Iterable[Part], scale: float, dx: float, dy: float, flip: bool = False) -> list[Part]:
    """The parts scaled about the origin, mirrored if `flip`, then shifted."""
    factor = np.array([-scale if flip else scale, scale])
    shift = np.array([dx, dy])
    return [replace(part, points=part.points * factor + shift, width=part.width * scale) for part in parts]


def turned(parts: Iterable[Part], degrees: float) -> list[Part]:
    """The parts rotated clockwise about the origin."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return [replace(part, points=part.points @ np.array([[c, s], [-s, c]])) for part in parts]
