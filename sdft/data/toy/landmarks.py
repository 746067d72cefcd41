"""Drawings of buildings, plants and land, each in its own free coordinates, and the table of all drawings.

Knows what each subject looks like as parts with roles. Must not know colours, looks or where the picture puts it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

from sdft.data.toy import newcomers, own, shapes
from sdft.data.toy.attachments import clothes
from sdft.data.toy.details import details
from sdft.data.toy.geometry import Part, blob, curve, moved, oval, poly, rect, stroke

FOREST_VARIANTS = 12


def house() -> list[Part]:
    """A house with a chimney."""
    panes = [part for x in (30, 70) for part in (
        rect("white", x - 10, 54, x + 10, 74, False), rect("glass", x - 7.5, 56.5, x + 7.5, 71.5))]
    return [
        rect("brick", 68, 4, 80, 34), rect("main", 14, 42, 86, 98), poly("roof", [(2, 46), (50, 4), (98, 46)]),
        *panes, rect("wood", 42, 66, 58, 98), oval("yellow", 54, 83, 2, 2, edge=False),
    ]


def castle() -> list[Part]:
    """A castle with three towers."""
    teeth = [rect("main", x, 44, x + 7, 54, False) for x in (26, 40, 54, 68)]
    return [
        rect("main", 38, 28, 62, 70), poly("roof", [(34, 30), (50, 0), (66, 30)]),
        *teeth, rect("main", 22, 52, 78, 98), rect("main", 4, 40, 26, 98), rect("main", 74, 40, 96, 98),
        poly("roof", [(0, 42), (15, 12), (30, 42)]), poly("roof", [(70, 42), (85, 12), (100, 42)]),
        blob("wooddark", [(39, 98), (39, 80), (50, 68), (61, 80), (61, 98)]),
        rect("ink", 46, 37, 54, 50, False), rect("ink", 11, 54, 19, 68, False), rect("ink", 81, 54, 89, 68, False),
        rect("dark", 22, 60, 78, 63.5, False),
    ]


def mushroom() -> list[Part]:
    """A spotted mushroom."""
    return [
        poly("leaf", [(22, 98), (16, 80), (30, 92), (34, 78), (40, 98)], False),
        blob("cream", [(40, 50), (38, 76), (32, 96), (50, 99), (68, 96), (62, 76), (60, 50)]),
        oval("shade", 50, 55, 20, 5, edge=False),
        blob("main", [(2, 52), (8, 26), (28, 6), (50, 0), (72, 6), (92, 26), (98, 52), (76, 56), (50, 53), (24, 56)]),
        oval("spot", 30, 24, 9, 8, edge=False), oval("spot", 62, 15, 8.5, 7, edge=False),
        oval("spot", 54, 38, 9, 8, edge=False), oval("spot", 82, 37, 7, 8, edge=False),
        oval("spot", 16, 43, 6, 6, edge=False),
    ]


def flower() -> list[Part]:
    """A flower with six petals on a stem."""
    petals = [oval("main", 50 + 20 * np.cos(a), 30 + 20 * np.sin(a), 15, 11.5, float(np.degrees(a)))
              for a in np.radians(np.arange(6) * 60.0 + 30.0)]
    return [
        curve("leafdark", [(50, 44), (52, 70), (49, 100)], 5),
        blob("leaf", [(50, 92), (60, 74), (82, 68), (76, 86)]), blob("leaf", [(50, 96), (40, 80), (20, 74), (26, 92)]),
        *petals, oval("core", 50, 30, 11.5, 11.5), oval("yellow", 47, 27, 5, 5, edge=False),
    ]


def tree() -> list[Part]:
    """A leafy tree."""
    crown = [(50, 0), (72, 6), (82, 20), (96, 34), (94, 54), (76, 66), (50, 64), (24, 66), (6, 54), (4, 34), (18, 20),
             (28, 6)]
    return [
        blob("wood", [(43, 58), (57, 58), (57, 84), (64, 98), (36, 98), (43, 84)]), blob("main", crown),
        blob("dark", [(10, 52), (30, 58), (50, 54), (72, 58), (92, 50), (76, 65), (50, 63), (24, 65)], False),
        oval("light", 36, 22, 14, 10, -25, edge=False), oval("light", 68, 34, 9, 6, -15, edge=False),
    ]


def star() -> list[Part]:
    """A five-pointed star."""
    def points(outer: float, inner: float) -> list[tuple[float, float]]:
        angles = np.radians(np.arange(10) * 36.0 - 90.0)
        return [(r * float(np.cos(a)), r * float(np.sin(a))) for a, r in zip(angles, [outer, inner] * 5, strict=True)]
    return [poly("main", points(50, 23)), poly("light", points(27, 12), False)]


def mountain() -> list[Part]:
    """Two snow-capped peaks."""
    return [
        poly("stonedark", [(54, 80), (94, 22), (138, 80)]), poly("stone", [(54, 80), (94, 22), (90, 50), (96, 80)],
            False),
        poly("snow", [(94, 22), (81, 41), (89, 39), (95, 46), (101, 38), (107, 40)], False),
        poly("stonedark", [(-6, 80), (50, 0), (104, 80)]), poly("stone", [(-6, 80), (50, 0), (44, 40), (56, 80)],
            False),
        poly("snow", [(50, 0), (31, 27), (41, 24), (49, 34), (58, 23), (70, 30)]),
    ]


def _pine(dark: bool) -> list[Part]:
    body, under = ("leafdark", "leaf") if not dark else ("pine", "leafdark")
    return [
        rect("wooddark", -5, -14, 5, 0, False), poly(body, [(-26, -12), (26, -12), (0, -54)], not dark),
        poly(under, [(-22, -36), (22, -36), (0, -76)], False), poly(body, [(-16, -60), (16, -60), (0, -96)], not dark),
    ]


def _toadstool() -> list[Part]:
    return [
        rect("cream", -3, -10, 3, 0, False),
        blob("redlamp", [(-11, -9), (-8, -18), (0, -22), (8, -18), (11, -9), (0, -8)]),
        oval("white", -3, -15, 2.6, 2.6, edge=False), oval("white", 5, -13, 2.2, 2.2, edge=False),
    ]


def _cottage() -> list[Part]:
    return [
        rect("cream", -13, -20, 13, 0), poly("brick", [(-18, -18), (0, -38), (18, -18)]),
        rect("wood", -4, -12, 4, 0, False),
        rect("flame", 6, -15, 11, -9, False), rect("flame", -11, -15, -6, -9, False),
    ]


def forest(variant: int) -> list[Part]:
    """A fairy tale forest across the whole picture: trees, a path, a lit cottage, toadstools."""
    rng = np.random.default_rng([7, variant])
    parts: list[Part] = []
    for x in (2, 26, 50, 74, 98):
        parts += moved(_pine(True), (0.44 if 10 < x < 90 else 0.62) + 0.08 * rng.random(), x + rng.uniform(-4, 4), 66)
    bend = rng.uniform(-8, 8)
    parts.append(blob("path", [(46, 70), (54, 70), (58 + bend, 82), (76, 104), (28, 104), (46 + bend, 82)], False))
    parts += moved(_cottage(), 0.78, 50 + rng.uniform(-3, 3), 74)
    for x in (14, 86):
        parts += moved(_pine(False), 0.84 + 0.12 * rng.random(), x + rng.uniform(-4, 4), 86)
    for x, y in ((20, 94), (78, 95)):
        parts += moved(_toadstool(), 0.85 + 0.25 * rng.random(), x + rng.uniform(-5, 5), y)
    return parts


_STILL = {
    "cat": shapes.cat, "dog": shapes.dog, "fish": shapes.fish, "butterfly": shapes.butterfly, "car": shapes.car,
    "laptop": shapes.laptop, "robot": shapes.robot, "cup": shapes.cup, "cake": shapes.cake, "guitar": shapes.guitar,
    "lamp": shapes.lamp, "boat": shapes.boat, "hot air balloon": shapes.balloon, "house": house, "castle": castle,
    "mushroom": mushroom, "flower": flower, "tree": tree, "star": star, "mountain": mountain,
    "sneaker": own.sneaker, "wizard": own.wizard, "rabbit": newcomers.rabbit, "owl": newcomers.owl,
    "train": newcomers.train, "bicycle": newcomers.bicycle, "umbrella": newcomers.umbrella, "chair": newcomers.chair,
}
_AIRBORNE = {"bird": shapes.bird, "rocket": shapes.rocket}


@lru_cache(maxsize=64)
def subject_parts(subject: str, variant: int = 0, airborne: bool = False) -> tuple[Part, ...]:
    """The parts of a subject, or one of OWN_KINDS; `variant` only changes forests, `airborne` birds, rockets."""
    if subject == "fairy tale forest":
        return tuple(forest(variant % FOREST_VARIANTS))
    if subject in _AIRBORNE:
        return tuple(_AIRBORNE[subject](airborne))
    if subject == "horse":
        return tuple(newcomers.horse(running=False))
    return tuple(_STILL[subject]())


_POSED: dict[tuple[str, str], Callable[[], list[Part]]] = {
    ("cat", "sleeping"): newcomers.cat_asleep, ("dog", "running"): newcomers.dog_running,
    ("horse", "running"): partial(newcomers.horse, running=True),
}


@lru_cache(maxsize=512)
def detailed_parts(
    subject: str, variant: int = 0, airborne: bool = False, pose: str = "", worn: str = ""
) -> tuple[Part, ...]:
    """The parts of a subject: what it does and wears, with small parts on top."""
    if (subject, pose) in _POSED:
        return tuple(_POSED[subject, pose]())
    parts = [*subject_parts(subject, variant, airborne), *details(subject, airborne)]
    if worn:
        parts += clothes(subject, worn)
    return tuple(newcomers.leaping(parts) if pose == "jumping" else parts)


def cactus() -> list[Part]:
    """A small cactus for deserts."""
    return [
        stroke("cactus", [(0, 0), (0, -40)], 9, False), oval("cactus", 0, -40, 4.5, 4.5, edge=False),
        curve("cactus", [(0, -16), (13, -18), (14, -32)], 6, False),
        curve("cactus", [(0, -10), (-12, -12), (-13, -24)], 6, False),
    ]
