"""Small parts that are added to the drawings: paws, keys, spokes, window bars.

Knows what lies on top of each subject's parts. Must not know colours, looks or pixels.
"""

from __future__ import annotations

import numpy as np

from sdft.data.toy.geometry import Part, curve, moved, oval, poly, rect, slab, stroke, turned


def _glint(x: float, y: float, r: float = 2.2) -> Part:
    return oval("white", x, y, r, r, edge=False)


def _toes(xs: tuple[float, ...], y: float) -> list[Part]:
    return [stroke("dark", [(x, y), (x, y + 5)], 1.8, False) for x in xs]


def _cat() -> list[Part]:
    whiskers = [
        stroke("white", [(50 + s * 13, 44 + d), (50 + s * 34, 41 + 3 * d)], 1.6, False) for s in (-1, 1) for d in (0, 4)
    ]
    return [
        *whiskers,
        *_toes((37, 42, 58, 63), 94),
        curve("ink", [(44, 48), (47, 51), (50, 48), (53, 51), (56, 48)], 1.8, False),
        _glint(36, 28, 2),
        _glint(60, 28, 2),
        *[curve("dark", [(x, 13), (x + 1, 19), (x, 23)], 3, False) for x in (43, 50, 57)],
        *[
            curve("dark", [(x, y), (x + 4 * s, y + 2), (x + 8 * s, y + 1)], 3, False)
            for x, s in ((31, 1), (69, -1))
            for y in (66, 76, 86)
        ],
        curve("light", [(88, 62), (86, 60), (84, 60)], 8, False),
    ]


def _dog() -> list[Part]:
    return [
        oval("yellow", 71, 53, 4, 4.5, edge=False),
        _glint(82, 22, 1.6),
        *_toes((18, 22, 66, 70), 90),
        curve("ink", [(90, 42), (98, 45), (106, 40)], 2, False),
        oval("light", 30, 52, 10, 7, -15, edge=False),
    ]


def _laptop() -> list[Part]:
    keys = [
        rect("light", 20 + 5.2 * k + 1.2 * row, 67 + 3.2 * row, 23.6 + 5.2 * k + 1.2 * row, 69.2 + 3.2 * row, False)
        for row in range(3)
        for k in range(12 - row // 2)
    ]
    return [
        *keys,
        poly("white", [(22, 16), (34, 16), (24, 40), (22, 40)], False),
        oval("steel", 50, 11, 1.4, 1.4, edge=False),
        rect("redlamp", 90, 82, 93, 84, False),
    ]


def _car() -> list[Part]:
    spokes = [
        stroke(
            "steel",
            [(x - 5.5 * np.cos(a), 74 - 5.5 * np.sin(a)), (x + 5.5 * np.cos(a), 74 + 5.5 * np.sin(a))],
            1.8,
            False,
        )
        for x in (30, 92)
        for a in np.radians((0.0, 60.0, 120.0))
    ]
    return [
        *spokes,
        rect("steel", 68, 50, 75, 52.5, False),
        stroke("light", [(8, 54), (40, 50), (108, 54)], 1.8, False),
        poly("white", [(40, 42), (48, 30), (52, 30), (45, 42)], False),
        poly("white", [(70, 42), (70, 30), (74, 30), (76, 42)], False),
        slab("metal", 111, 64, 122, 69, 2),
        slab("metal", 0, 64, 9, 69, 2),
        curve("dark", [(14, 68), (18, 58), (30, 54), (42, 58), (46, 68)], 3, False),
        curve("dark", [(76, 68), (80, 58), (92, 54), (104, 58), (108, 68)], 3, False),
    ]


def _house() -> list[Part]:
    tiles = [
        stroke("brick", [(50 - w, y), (50 + w, y)], 1.5, False) for y, w in ((18, 13), (26, 23), (34, 32), (41, 40))
    ]
    bars = [
        part
        for x in (30, 70)
        for part in (
            rect("white", x - 1, 56, x + 1, 72, False),
            rect("white", x - 8, 63, x + 8, 65, False),
            rect("leaf", x - 11, 74, x + 11, 78, False),
        )
    ]
    return [
        *tiles,
        *bars,
        rect("wooddark", 65, 1, 83, 6),
        rect("stone", 38, 96, 62, 101, False),
        rect("wooddark", 45, 70, 49, 94, False),
        rect("wooddark", 51, 70, 52.5, 94, False),
    ]


def _castle() -> list[Part]:
    bricks = [
        rect("dark", x, y, x + 5, y + 1.8, False)
        for x, y in (
            (28, 70),
            (66, 72),
            (30, 84),
            (68, 86),
            (6, 76),
            (18, 84),
            (78, 78),
            (88, 86),
            (10, 92),
            (84, 94),
            (30, 57),
            (62, 57),
        )
    ]
    flags = [
        part
        for x, y in ((15, 12), (50, 0), (85, 12))
        for part in (
            stroke("steel", [(x, y), (x, y - 12)], 1.6, False),
            poly("redlamp", [(x, y - 12), (x + 11, y - 8.5), (x, y - 5)], False),
        )
    ]
    gate = [stroke("steel", [(x, 76), (x, 98)], 1.4, False) for x in (45, 50, 55)]
    return [*bricks, *flags, *gate, stroke("steel", [(40, 86), (60, 86)], 1.4, False)]


def _fish() -> list[Part]:
    scales = [
        curve("dark", [(x, y - 4), (x + 3.5, y), (x, y + 4)], 1.6, False)
        for x, y in ((50, 30), (50, 40), (50, 50), (70, 32), (70, 42), (55, 35), (55, 45), (75, 38))
    ]
    return [
        *scales,
        *[stroke("main", [(94, 38 + d), (104, 38 + 2.4 * d)], 1.8, False) for d in (-8, 0, 8)],
        _glint(17, 29, 1.4),
        poly("dark", [(30, 44), (44, 50), (32, 54)]),
    ]


def _butterfly() -> list[Part]:
    dots = [
        oval("white", 50 + s * x, y, r, r, edge=False)
        for s in (-1, 1)
        for x, y, r in ((46, 16, 2.5), (47, 25, 2.5), (44, 34, 2.5), (36, 76, 2.5), (28, 83, 2.5))
    ]
    veins = [
        stroke("dark", [(50 + s * 6, 40), (50 + s * x, y)], 1.6, False)
        for s in (-1, 1)
        for x, y in ((40, 12), (46, 30))
    ]
    return [
        *veins,
        *dots,
        oval("ink", 34, 5, 2.5, 2.5, edge=False),
        oval("ink", 66, 5, 2.5, 2.5, edge=False),
        *[rect("light", 45.5, y, 54.5, y + 3, False) for y in (42, 54, 66)],
    ]


def _robot() -> list[Part]:
    bolts = [oval("steel", x, y, 1.8, 1.8, edge=False) for x in (29, 71) for y in (16, 42, 53, 85)]
    return [
        *bolts,
        *[rect("ink", x, 38, x + 1.6, 40, False) for x in (42, 46, 50, 54, 58)],
        _glint(37, 24, 2),
        _glint(59, 24, 2),
        rect("dark", 36, 73, 64, 75, False),
        rect("ink", 44, 46, 56, 49, False),
    ]


def _boat() -> list[Part]:
    return [
        stroke("wooddark", [(5, 79), (99, 79)], 1.6, False),
        *[oval("glass", x, 83, 3.2, 3.2) for x in (32, 52, 72)],
        *[
            stroke("shade", [(x0, y), (x1, y)], 1.4, False)
            for x0, x1, y in ((56, 76, 34), (56, 84, 48), (32, 44, 40), (24, 44, 54))
        ],
    ]


def _rocket() -> list[Part]:
    return [
        *[oval("steel", x, y, 1.5, 1.5, edge=False) for x in (36, 50, 64) for y in (60,)],
        _glint(47, 38, 2.5),
        rect("redlamp", 31, 26, 69, 29, False),
        *[rect("ink", x, 82, x + 2, 90, False) for x in (43, 49, 55)],
    ]


def _guitar() -> list[Part]:
    strings = [stroke("metal", [(x, -36), (1.5 * x, 47)], 0.9, False) for x in (-3, -1, 1, 3)]
    frets = [stroke("metal", [(-5, y), (5, y)], 1.2, False) for y in (-30, -22, -14, -6, 3, 12)]
    pegs = [oval("cream", s * 10, y, 2.4, 2.4) for s in (-1, 1) for y in (-50, -44, -39)]
    return turned([*frets, *strings, *pegs, curve("light", [(-24, 40), (-26, 52), (-16, 60)], 2.5, False)], 22.0)


def _lamp() -> list[Part]:
    return [
        *[stroke("dark", [(50 + d, 5), (50 + 2.2 * d, 49)], 1.6, False) for d in (-14, -7, 7, 14)],
        rect("light", 34, 91, 66, 93, False),
        curve("steel", [(60, 50), (62, 60), (60, 66)], 1.4, False),
        oval("yellow", 60, 68, 2, 2, edge=False),
    ]


def _cup() -> list[Part]:
    heart = [(45, 58), (38, 50), (33, 55), (36, 64), (45, 73), (54, 64), (57, 55), (52, 50)]
    return [
        poly("light", heart, False),
        curve("light", [(19, 44), (20, 62), (27, 78)], 3, False),
        oval("coffee", 45, 35, 29, 5.5, edge=False),
        oval("shade", 38, 34, 8, 1.8, edge=False),
    ]


def _cake() -> list[Part]:
    colours = ("redlamp", "screen", "leaf", "yellow", "white")
    sprinkles = [
        stroke(colours[k % 5], [(x, y), (x + 3, y + 2 * (-1) ** k)], 1.8, False)
        for k, (x, y) in enumerate(
            ((18, 40), (30, 38), (38, 42), (46, 34), (56, 40), (64, 36), (72, 41), (82, 39), (60, 48), (24, 46))
        )
    ]
    return [
        *sprinkles,
        *[oval("redlamp", x, 68, 3, 3, edge=False) for x in (18, 34, 50, 66, 82)],
        *[stroke("redlamp", [(x - 2.5, y), (x + 2.5, y - 3)], 1.6, False) for x in (28, 50, 72) for y in (20, 27)],
    ]


def _mushroom() -> list[Part]:
    return [
        *[stroke("shade", [(50 + d, 54), (50 + 0.8 * d, 60)], 1.5, False) for d in (-14, -8, 0, 8, 14)],
        curve("light", [(10, 34), (22, 16), (38, 8)], 3, False),
        *[stroke("leafdark", [(x, 99), (x + d, 88)], 1.8, False) for x, d in ((70, 4), (76, -2), (82, 5))],
    ]


def _flower() -> list[Part]:
    veins = [
        stroke(
            "dark", [(50 + 13 * np.cos(a), 30 + 13 * np.sin(a)), (50 + 27 * np.cos(a), 30 + 27 * np.sin(a))], 1.6, False
        )
        for a in np.radians(np.arange(6) * 60.0 + 30.0)
    ]
    return [
        *veins,
        *[
            oval("orange", 50 + 7 * np.cos(a), 30 + 7 * np.sin(a), 1.3, 1.3, edge=False)
            for a in np.radians(np.arange(8) * 45.0)
        ],
        stroke("leafdark", [(54, 90), (74, 74)], 1.6, False),
        stroke("leafdark", [(46, 92), (28, 80)], 1.6, False),
    ]


def _tree() -> list[Part]:
    clumps = [
        curve("dark", [(x - 7, y), (x, y + 4), (x + 7, y)], 2.2, False)
        for x, y in ((30, 40), (54, 46), (66, 22), (44, 14), (78, 48), (20, 30))
    ]
    return [
        *clumps,
        *[oval("redlamp", x, y, 3.4, 3.4, edge=False) for x, y in ((26, 50), (46, 32), (62, 54), (80, 36), (58, 12))],
        stroke("wooddark", [(48, 68), (47, 92)], 1.8, False),
        stroke("wooddark", [(53, 72), (55, 94)], 1.8, False),
    ]


def _mountain() -> list[Part]:
    return [
        *[stroke("stonedark", [(50 - 0.35 * y, y), (50 - 0.35 * y - 8, y + 16)], 2, False) for y in (40, 54)],
        *[stroke("stonedark", [(91, y), (82, y + 14)], 2, False) for y in (50, 60)],
        *[
            part
            for x, y in ((10, 80), (24, 80), (84, 80), (120, 80))
            for part in moved([poly("pine", [(-5, 0), (5, 0), (0, -14)], False)], 1.0, x, y)
        ],
    ]


def _balloon() -> list[Part]:
    return [
        stroke("wooddark", [(45, 75), (46, 84)], 1.6, False),
        stroke("wooddark", [(55, 75), (54, 84)], 1.6, False),
        *[stroke("wooddark", [(42, y), (58, y)], 1.4, False) for y in (87, 92)],
        *[stroke("wooddark", [(x, 83), (x, 97)], 1.2, False) for x in (46, 50, 54)],
        oval("flame", 50, 79, 2.4, 3.4, edge=False),
        stroke("dark", [(15, 40), (50, 46), (85, 40)], 3, False),
    ]


def _star() -> list[Part]:
    rays = [
        stroke("dark", [(0, 0), (23 * np.cos(a), 23 * np.sin(a))], 1.6, False)
        for a in np.radians(np.arange(5) * 72.0 - 54.0)
    ]
    return [*rays, oval("white", -8, -14, 3, 6, 25, edge=False)]


def _bird() -> list[Part]:
    return [
        _glint(25, 25, 1.4),
        *[
            curve("light", [(x, y), (x + 10, y + 4), (x + 20, y + 3)], 1.8, False)
            for x, y in ((52, 51), (56, 57), (62, 63))
        ],
        stroke("ink", [(14, 31), (-3, 33)], 1.4, False),
    ]


def _bird_airborne() -> list[Part]:
    return [
        _glint(25, 25, 1.4),
        *[stroke("light", [(x, y), (x + 14, y - 22)], 1.8, False) for x, y in ((54, 48), (60, 46), (66, 42))],
        stroke("ink", [(14, 31), (-3, 33)], 1.4, False),
    ]


def _sneaker() -> list[Part]:
    return [
        *[stroke("shade", [(x, 66), (x, 72)], 1.5, False) for x in range(14, 112, 8)],
        oval("white", 34, 16, 5, 5, edge=False),
        oval("yellow", 34, 16, 2.4, 2.4, edge=False),
    ]


def _wizard() -> list[Part]:
    star = [
        (10 * r * np.cos(a), 10 * r * np.sin(a))
        for a, r in zip(np.radians(np.arange(10) * 36.0 - 90.0), [0.6, 0.26] * 5, strict=True)
    ]
    stars = [
        part for x, y in ((26, 70), (70, 82), (40, 12)) for part in moved([poly("yellow", star, False)], 1.0, x, y)
    ]
    return [
        *stars,
        *[curve("shade", [(x, 56), (x + d, 72), (50 + d, 84)], 1.6, False) for x, d in ((38, 2), (50, 0), (62, -2))],
        _glint(40, 36, 1.6),
        _glint(58, 36, 1.6),
        _glint(96, 10, 3),
    ]


_DETAILS = {
    "cat": _cat,
    "dog": _dog,
    "laptop": _laptop,
    "car": _car,
    "house": _house,
    "castle": _castle,
    "fish": _fish,
    "butterfly": _butterfly,
    "robot": _robot,
    "boat": _boat,
    "rocket": _rocket,
    "guitar": _guitar,
    "lamp": _lamp,
    "cup": _cup,
    "cake": _cake,
    "mushroom": _mushroom,
    "flower": _flower,
    "tree": _tree,
    "mountain": _mountain,
    "hot air balloon": _balloon,
    "star": _star,
    "bird": _bird,
    "sneaker": _sneaker,
    "wizard": _wizard,
}


def details(subject: str, airborne: bool = False) -> list[Part]:
    """What lies on top of the subject's own parts; newcomers and forests have theirs already."""
    if subject == "bird" and airborne:
        return _bird_airborne()
    return _DETAILS[subject]() if subject in _DETAILS else []
