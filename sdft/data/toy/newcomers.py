"""Drawings of seven subjects, and animals that do something.

Knows them as parts with roles, as `shapes` does. Must not know colours, looks or where the picture puts them.
"""

from __future__ import annotations

import numpy as np

from sdft.data.toy.geometry import Part, blob, curve, moved, oval, poly, rect, slab, stroke, turned


def _ring(role: str, x: float, y: float, radius: float, width: float) -> Part:
    """A circle as a line."""
    angle = np.linspace(0.0, 2.0 * np.pi, 33)
    return Part(np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1), role, width)


def _eyes(xs: tuple[float, ...], y: float, size: float) -> list[Part]:
    return [
        part
        for x in xs
        for part in (
            oval("ink", x, y, size, 1.15 * size, edge=False),
            oval("white", x - 0.3 * size, y - 0.4 * size, 0.38 * size, 0.38 * size, edge=False),
        )
    ]


def rabbit() -> list[Part]:
    """A sitting rabbit, seen from the front."""
    ears = [
        part
        for side in (-1, 1)
        for part in (
            blob("main", [(50 + side * x, y) for x, y in ((20, 30), (25, 4), (22, -22), (12, -22), (5, 2), (5, 28))]),
            blob(
                "pink",
                [(50 + side * x, y) for x, y in ((17, 24), (20, 4), (18, -14), (14, -13), (10, 4), (10, 24))],
                False,
            ),
        )
    ]
    return [
        oval("light", 84, 84, 10, 10),
        blob("main", [(33, 56), (22, 80), (26, 98), (50, 101), (76, 98), (80, 80), (67, 56)]),
        oval("light", 50, 80, 14, 17, edge=False),
        *ears,
        oval("main", 50, 42, 27, 22),
        oval("light", 50, 51, 13, 9, edge=False),
        *_eyes((39, 61), 38, 4.6),
        poly("pink", [(45, 46), (55, 46), (50, 51)], False),
        rect("white", 46.5, 54, 53.5, 60, False),
        oval("main", 34, 97, 14, 7),
        oval("main", 66, 97, 14, 7),
    ]


def owl() -> list[Part]:
    """An owl, seen from the front."""
    marks = [
        curve("dark", [(x - 5, y), (x, y + 4), (x + 5, y)], 2.5, False)
        for x, y in ((42, 64), (58, 64), (34, 73), (50, 73), (66, 73), (42, 82), (58, 82))
    ]
    eyes = [
        part
        for x in (35, 65)
        for part in (
            oval("white", x, 32, 16, 16),
            oval("yellow", x, 32, 10, 10, edge=False),
            oval("ink", x, 32, 5.5, 5.5, edge=False),
            oval("white", x - 2, 30, 2, 2, edge=False),
        )
    ]
    return [
        blob("main", [(20, 28), (14, 60), (24, 90), (50, 98), (76, 90), (86, 60), (80, 28), (50, 10)]),
        poly("main", [(18, 32), (16, -2), (42, 14)]),
        poly("main", [(82, 32), (84, -2), (58, 14)]),
        oval("light", 50, 71, 25, 24, edge=False),
        *marks,
        blob("dark", [(18, 44), (8, 64), (16, 88), (28, 70)]),
        blob("dark", [(82, 44), (92, 64), (84, 88), (72, 70)]),
        *eyes,
        poly("orange", [(44, 40), (56, 40), (50, 53)]),
        oval("orange", 40, 98, 8, 4),
        oval("orange", 60, 98, 8, 4),
    ]


def _horse(legs: list[Part], tilt: float) -> list[Part]:
    body = [
        curve("dark", [(8, 44), (-6, 52), (-8, 74)], 9),
        blob("main", [(4, 42), (22, 36), (56, 40), (70, 38), (76, 54), (64, 68), (30, 66), (8, 62)]),
        blob(
            "main", [(58, 58), (60, 34), (72, 8), (86, 2), (96, 12), (112, 24), (108, 34), (92, 30), (84, 36), (78, 58)]
        ),
        blob("dark", [(54, 44), (58, 22), (70, 2), (82, -4), (84, 4), (72, 18), (66, 42)]),
        poly("main", [(82, 6), (86, -10), (92, 6)]),
        *_eyes((94,), 14, 2.8),
        oval("light", 107, 28, 6, 6, edge=False),
        oval("ink", 110, 27, 1.6, 1.6, edge=False),
    ]
    return turned([*legs, *body], tilt)


def horse(running: bool) -> list[Part]:
    """A horse seen from the side, facing right; it stands, or leaps with its legs stretched out."""
    if running:
        stretched = (
            (14, 58, -14, 88, "dark"),
            (60, 60, 88, 86, "dark"),
            (22, 60, 0, 96, "main"),
            (66, 58, 104, 78, "main"),
        )
        legs = [
            part
            for x0, y0, x1, y1, role in stretched
            for part in (
                stroke(role, [(x0, y0), ((x0 + x1) / 2 + 3, (y0 + y1) / 2 - 3), (x1, y1)], 9),
                oval("ink", x1, y1, 5, 5),
            )
        ]
        return _horse(legs, -8.0)
    legs = [
        part
        for x, role in ((20, "dark"), (58, "dark"), (10, "main"), (68, "main"))
        for part in (slab(role, x - 5, 56, x + 5, 98, 4), slab("ink", x - 5.5, 92, x + 6, 99, 2))
    ]
    return _horse(legs, 0.0)


def train() -> list[Part]:
    """A steam engine seen from the side, facing right."""
    wheels = [
        part
        for x, r in ((18, 13), (48, 10), (71, 10), (94, 10))
        for part in (
            oval("ink", x, 98 - r, r, r),
            oval("metal", x, 98 - r, 0.55 * r, 0.55 * r, edge=False),
            stroke("steel", [(x - 0.5 * r, 98 - r), (x + 0.5 * r, 98 - r)], 2, False),
            stroke("steel", [(x, 98 - 1.5 * r), (x, 98 - 0.5 * r)], 2, False),
        )
    ]
    return [
        oval("steam", 84, 4, 9, 7, edge=False),
        oval("steam", 72, -5, 11, 8, edge=False),
        poly("dark", [(80, 38), (78, 16), (92, 16), (90, 38)]),
        rect("ink", 76, 12, 94, 18),
        blob("yellow", [(54, 38), (54, 28), (60, 23), (66, 28), (66, 38)]),
        slab("main", 36, 36, 108, 74, 9),
        rect("main", 2, 20, 40, 78),
        rect("roof", -4, 12, 46, 21),
        rect("white", 9, 29, 31, 49, False),
        rect("glass", 11, 31, 29, 47),
        *[rect("light", x, 37, x + 3, 73, False) for x in (54, 74, 94)],
        oval("yellow", 108, 46, 6, 6),
        rect("steel", -2, 74, 112, 81),
        poly("redlamp", [(104, 81), (112, 81), (122, 98), (104, 98)]),
        *wheels,
        stroke("metal", [(48, 88), (94, 88)], 3, False),
    ]


def bicycle() -> list[Part]:
    """A bicycle seen from the side, facing right."""
    spokes = [
        stroke(
            "metal", [(x - 21 * np.cos(a), 72 - 21 * np.sin(a)), (x + 21 * np.cos(a), 72 + 21 * np.sin(a))], 1.5, False
        )
        for x in (26, 98)
        for a in np.radians((15.0, 75.0, 135.0))
    ]
    return [
        *spokes,
        _ring("ink", 26, 72, 24, 5.5),
        _ring("ink", 98, 72, 24, 5.5),
        stroke("main", [(26, 72), (48, 34), (86, 34), (56, 72), (26, 72)], 6),
        stroke("main", [(46, 24), (56, 72)], 6),
        stroke("main", [(98, 72), (82, 14)], 6),
        curve("steel", [(72, 12), (84, 10), (94, 14), (92, 22)], 5),
        slab("wooddark", 34, 18, 58, 26, 3),
        oval("steel", 56, 72, 7, 7),
        oval("ink", 26, 72, 4, 4, edge=False),
        oval("ink", 98, 72, 4, 4, edge=False),
    ]


def umbrella() -> list[Part]:
    """An open umbrella with a curved handle."""
    edge = [(2, 50), (13, 44), (26, 50), (38, 44), (50, 50), (62, 44), (74, 50), (87, 44), (98, 50)]
    return [
        rect("steel", 48, 40, 52, 86, False),
        curve("wood", [(50, 78), (50, 94), (42, 99), (35, 92)], 6),
        rect("steel", 48.5, -3, 51.5, 6, False),
        poly(
            "main",
            [(2, 50), (5, 32), (16, 16), (32, 5), (50, 2), (68, 5), (84, 16), (95, 32), (98, 50), *edge[::-1][1:-1]],
        ),
        poly("light", [(26, 50), (30, 28), (44, 5), (50, 2), (50, 50), (38, 44)], False),
        poly("light", [(74, 50), (72, 30), (60, 5), (68, 5), (84, 16), (95, 32), (98, 50), (87, 44)], False),
    ]


def chair() -> list[Part]:
    """A wooden chair with a high back, seen from the side and a little from above."""
    return [
        slab("dark", 32, 62, 40, 92, 3),
        slab("dark", 78, 60, 86, 90, 3),
        slab("main", 18, 0, 27, 60, 4),
        slab("main", 56, -6, 65, 52, 4),
        *[poly("light", [(22, y), (60, y - 6), (60, y + 3), (22, y + 9)]) for y in (5, 21, 37)],
        slab("main", 18, 60, 27, 100, 3),
        slab("main", 64, 64, 73, 98, 3),
        poly("main", [(14, 58), (58, 50), (92, 58), (70, 70), (14, 68)]),
        poly("light", [(20, 59), (57, 53), (84, 59), (68, 65), (20, 64)], False),
    ]


def cat_asleep() -> list[Part]:
    """A cat curled up, its head on its paws."""
    return [
        blob("main", [(2, 62), (12, 34), (44, 20), (80, 28), (102, 54), (98, 76), (60, 82), (16, 80)]),
        *[
            curve("dark", [(x, y), (x + 5, y + 9), (x + 4, y + 18)], 4, False)
            for x, y in ((52, 23), (66, 24), (79, 30))
        ],
        curve("dark", [(98, 70), (86, 82), (60, 84), (42, 82)], 10),
        poly("main", [(6, 50), (4, 22), (24, 38)]),
        poly("main", [(52, 50), (54, 22), (34, 38)]),
        poly("pink", [(9, 44), (9, 31), (18, 39)], False),
        poly("pink", [(49, 44), (49, 31), (40, 39)], False),
        oval("main", 29, 58, 27, 22),
        oval("light", 29, 67, 13, 9, edge=False),
        curve("ink", [(13, 56), (18, 59), (23, 56)], 2.5, False),
        curve("ink", [(35, 56), (40, 59), (45, 56)], 2.5, False),
        poly("pink", [(25, 63), (33, 63), (29, 68)], False),
        *[
            stroke("white", [(29 + s * 12, 66 + d), (29 + s * 27, 64 + 3 * d)], 1.5, False)
            for s in (-1, 1)
            for d in (0, 3)
        ],
    ]


def dog_running() -> list[Part]:
    """A dog that runs to the right, its ear flying behind."""
    legs = [
        stroke(role, [(x0, y0), (x1, y1), (x2, y2)], 10)
        for role, x0, y0, x1, y1, x2, y2 in (
            ("dark", 26, 62, 8, 74, -10, 72),
            ("dark", 66, 64, 84, 78, 100, 74),
            ("main", 20, 62, 8, 82, -8, 90),
            ("main", 70, 62, 94, 70, 108, 86),
        )
    ]
    return [
        *legs,
        curve("main", [(16, 46), (0, 34), (-4, 16)], 9),
        blob("main", [(10, 48), (28, 40), (58, 40), (78, 42), (82, 58), (68, 72), (26, 70), (10, 62)]),
        oval("light", 46, 66, 18, 4, edge=False),
        stroke("trim", [(66, 42), (84, 50)], 8, False),
        oval("main", 84, 26, 19, 18),
        oval("light", 102, 34, 14, 9),
        oval("ink", 113, 29, 5.5, 5, edge=False),
        blob("dark", [(74, 14), (66, 4), (46, 6), (44, 16), (62, 26), (74, 28)]),
        *_eyes((91,), 22, 4),
        blob("pink", [(98, 42), (107, 42), (108, 54), (101, 54)], False),
    ]


def leaping(parts: list[Part]) -> list[Part]:
    """The drawing tilted, as in a jump; what it stands on is to lie below."""
    return turned(moved(parts, 1.0, -50.0, -50.0), -16.0)
