"""Drawings of animals and things, each in its own free coordinates (y down, about 100 units high).

Knows what a cat or a cup looks like as parts with roles. Must not know colours, looks or where the picture puts it.
`main`, `dark`, `light` stand for the subject's colour; `trim`, `roof`, `spot`, `core` for paints that contrast with it.
"""

from __future__ import annotations

from sdft.data.toy.geometry import Part, blob, curve, oval, poly, rect, slab, stroke, turned


def cat() -> list[Part]:
    """A sitting cat, seen from the front."""
    return [
        curve("dark", [(62, 90), (84, 92), (93, 76), (86, 60)], 9),
        blob("main", [(38, 48), (29, 76), (30, 97), (50, 100), (70, 97), (71, 76), (62, 48)]),
        oval("light", 50, 72, 11, 17, edge=False),
        oval("light", 40, 96, 9, 5, edge=False), oval("light", 60, 96, 9, 5, edge=False),
        poly("main", [(24, 34), (23, 2), (48, 18)]), poly("main", [(76, 34), (77, 2), (52, 18)]),
        poly("pink", [(29, 24), (28, 11), (39, 18)], False), poly("pink", [(71, 24), (72, 11), (61, 18)], False),
        oval("main", 50, 34, 28, 23),
        oval("light", 50, 44, 14, 9, edge=False),
        oval("eye", 38, 31, 7, 7.5), oval("eye", 62, 31, 7, 7.5),
        oval("ink", 38, 31, 3, 6.5, edge=False), oval("ink", 62, 31, 3, 6.5, edge=False),
        poly("pink", [(45, 39), (55, 39), (50, 45)], False),
    ]


def dog() -> list[Part]:
    """A standing dog, seen from the side, with a hanging ear."""
    return [
        curve("main", [(17, 52), (5, 42), (5, 24)], 9),
        slab("dark", 28, 60, 39, 94, 5), slab("dark", 52, 60, 63, 94, 5),
        slab("main", 14, 58, 27, 96, 6), slab("main", 62, 56, 75, 96, 6),
        blob("main", [(12, 50), (28, 42), (56, 42), (74, 46), (77, 64), (64, 75), (26, 75), (12, 68)]),
        oval("light", 46, 69, 15, 4, edge=False),
        stroke("trim", [(60, 45), (80, 50)], 8, False),
        oval("main", 76, 28, 19, 19), oval("light", 94, 36, 14, 9),
        oval("ink", 105, 31, 5.5, 5, edge=False),
        blob("dark", [(62, 14), (70, 14), (73, 34), (68, 50), (57, 46), (56, 28)]),
        oval("ink", 83, 24, 4, 4.5, edge=False),
        poly("pink", [(92, 44), (101, 44), (97, 54)], False),
    ]


def bird(airborne: bool) -> list[Part]:
    """A bird facing left; on the ground it stands on two legs, in the air it lifts its wing."""
    legs = [stroke("orange", [(50, 70), (50, 95), (41, 97)], 4),
            stroke("orange", [(63, 70), (63, 95), (54, 97)], 4)]
    folded = blob("dark", [(44, 46), (66, 42), (94, 62), (70, 68), (50, 64)])
    lifted = blob("dark", [(42, 52), (52, 26), (74, 4), (86, 2), (84, 26), (72, 56), (56, 62)])
    return ([] if airborne else legs) + [
        poly("dark", [(80, 50), (116, 36), (113, 62), (86, 70)]),
        blob("main", [(12, 30), (20, 14), (38, 12), (52, 26), (78, 38), (92, 58), (76, 77), (46, 80), (22, 64),
            (17, 46)]),
        blob("light", [(21, 48), (32, 48), (46, 66), (64, 74), (46, 78), (26, 64)], False),
        poly("orange", [(15, 23), (-6, 33), (15, 39)]),
        lifted if airborne else folded,
        oval("white", 27, 27, 6.5, 6.5, edge=False), oval("ink", 26, 27, 3.6, 3.8, edge=False),
    ]


def fish() -> list[Part]:
    """A fish facing left."""
    return [
        blob("dark", [(78, 36), (104, 12), (112, 16), (104, 38), (112, 60), (104, 64)]),
        poly("dark", [(34, 18), (58, 0), (72, 20)]), poly("dark", [(44, 58), (66, 76), (68, 54)]),
        blob("main", [(0, 38), (12, 22), (36, 12), (64, 18), (88, 36), (64, 56), (36, 64), (12, 54)]),
        blob("light", [(8, 48), (36, 54), (66, 50), (38, 62), (16, 57)], False),
        blob("light", [(36, 14), (44, 14), (47, 38), (42, 62), (35, 62), (39, 38)], False),
        blob("light", [(58, 17), (65, 20), (67, 38), (63, 55), (57, 58), (60, 38)], False),
        oval("white", 19, 31, 7.5, 7.5), oval("ink", 18, 31, 4, 4, edge=False),
        stroke("ink", [(2, 43), (12, 45)], 3, False),
    ]


def butterfly() -> list[Part]:
    """A butterfly with open wings."""
    wings: list[Part] = []
    for side in (-1, 1):
        wings += [
            blob("main", [(50 + side * x, y) for x, y in ((4, 42), (14, 16), (38, 4), (52, 12), (48, 38), (28, 50))]),
            blob("dark", [(50 + side * x, y) for x, y in ((4, 50), (28, 50), (42, 62), (36, 84), (22, 88), (8, 66))]),
            oval("light", 50 + side * 33, 24, 10, 11, edge=False), oval("light", 50 + side * 25, 68, 8, 10, edge=False),
            curve("ink", [(50, 28), (50 + side * 7, 14), (50 + side * 16, 6)], 3, False),
        ]
    return [*wings, slab("ink", 45, 26, 55, 80, 5), oval("ink", 50, 26, 7, 7)]


def car() -> list[Part]:
    """A car seen from the side."""
    wheels = [part for x in (30, 92) for part in (oval("ink", x, 74, 14, 14),
        oval("metal", x, 74, 6.5, 6.5, edge=False))]
    return [
        blob("main", [(3, 72), (4, 54), (14, 47), (28, 43), (44, 22), (62, 19), (82, 22), (98, 45), (112, 49),
            (119, 58),
                      (118, 72), (60, 75)]),
        poly("glass", [(36, 44), (48, 27), (60, 26), (60, 44)]),
        poly("glass", [(66, 44), (66, 26), (79, 28), (91, 44)]),
        rect("dark", 5, 64, 117, 72, False), stroke("dark", [(63, 46), (63, 64)], 2.5, False),
        oval("yellow", 113, 56, 5, 4.5, edge=False), oval("redlamp", 6, 57, 3.5, 4.5, edge=False), *wheels,
    ]


def laptop() -> list[Part]:
    """An open laptop."""
    return [
        slab("main", 14, 8, 86, 62, 5), rect("screen", 20, 14, 80, 56),
        blob("screenlight", [(20, 56), (20, 44), (36, 32), (50, 44), (62, 34), (80, 48), (80, 56)], False),
        oval("white", 66, 25, 6, 6, edge=False),
        poly("light", [(14, 62), (86, 62), (100, 86), (0, 86)]),
        poly("steel", [(20, 66), (80, 66), (86, 76), (14, 76)], False),
        poly("main", [(41, 78), (59, 78), (61, 84), (39, 84)], False), rect("dark", 0, 86, 100, 91, False),
    ]


def robot() -> list[Part]:
    """A friendly robot with an antenna."""
    return [
        stroke("steel", [(50, 12), (50, 2)], 4, False), oval("redlamp", 50, 1, 5, 5),
        slab("dark", 12, 50, 24, 80, 5), slab("dark", 76, 50, 88, 80, 5),
        oval("steel", 18, 82, 7, 6, edge=False), oval("steel", 82, 82, 7, 6, edge=False),
        slab("steel", 32, 84, 46, 102, 3), slab("steel", 54, 84, 68, 102, 3),
        slab("main", 25, 12, 75, 46, 7), slab("main", 24, 48, 76, 90, 5),
        oval("lamp", 39, 26, 7, 7), oval("lamp", 61, 26, 7, 7),
        rect("steel", 38, 37, 62, 41, False),
        slab("light", 33, 56, 67, 78, 3, False), oval("redlamp", 42, 67, 5, 5, edge=False),
        oval("yellow", 57, 67, 5, 5, edge=False),
    ]


def cup() -> list[Part]:
    """A steaming cup with a handle on a saucer."""
    return [
        curve("steam", [(36, 24), (30, 16), (38, 8), (33, 0)], 4.5, False),
        curve("steam", [(54, 24), (48, 16), (56, 8), (51, 0)], 4.5, False),
        oval("light", 45, 92, 44, 7),
        curve("main", [(72, 44), (92, 42), (92, 66), (68, 72)], 8),
        blob("main", [(11, 34), (45, 36), (79, 34), (77, 60), (64, 90), (45, 93), (26, 90), (13, 60)]),
        oval("light", 45, 34, 34, 8), oval("coffee", 45, 35, 28, 5, edge=False),
    ]


def cake() -> list[Part]:
    """A layered cake with three candles."""
    candles = [part for x in (28, 50, 72) for part in (
        rect("white", x - 2.5, 14, x + 2.5, 32, False), oval("flame", x, 9, 4, 6.5))]
    icing = [(8, 34), (50, 26), (92, 34), (92, 46), (82, 56), (74, 46), (62, 46), (54, 60), (44, 48), (34, 46),
        (26, 56),
             (16, 50), (8, 48)]
    return [
        oval("plate", 50, 90, 58, 8), slab("main", 8, 34, 92, 90, 6), rect("cream", 8, 64, 92, 71, False), *candles,
        blob("light", icing), oval("spot", 20, 80, 4, 4, edge=False), oval("spot", 50, 80, 4, 4, edge=False),
        oval("spot", 80, 80, 4, 4, edge=False),
    ]


def guitar() -> list[Part]:
    """A leaning guitar."""
    body = [(-15, -2), (-23, 8), (-19, 21), (-28, 33), (-31, 50), (-20, 63), (0, 67), (20, 63), (31, 50), (28, 33),
            (19, 21), (23, 8), (15, -2), (0, 2)]
    parts = [
        blob("main", body), oval("ink", 0, 26, 10, 10), rect("wooddark", -5, -36, 5, 20),
        poly("wood", [(-7, -36), (7, -36), (9, -54), (-9, -54)]), slab("wooddark", -14, 46, 14, 52, 2, False),
        stroke("light", [(0, -36), (0, 47)], 2, False),
    ]
    return turned(parts, 22.0)


def lamp() -> list[Part]:
    """A table lamp with a lit bulb."""
    return [
        rect("steel", 46, 44, 54, 92), slab("dark", 28, 90, 72, 98, 4), oval("flame", 50, 50, 12, 9),
        poly("main", [(34, 4), (66, 4), (86, 50), (14, 50)]), poly("light", [(42, 4), (52, 4), (50, 50), (30, 50)],
            False),
    ]


def rocket(airborne: bool) -> list[Part]:
    """A rocket; it burns only in the air."""
    fire = [blob("flame", [(38, 84), (62, 84), (60, 98), (50, 116), (40, 98)]),
            blob("yellow", [(44, 84), (56, 84), (50, 102)], False)]
    return (fire if airborne else []) + [
        blob("trim", [(32, 54), (12, 76), (13, 96), (34, 82)]), blob("trim", [(68, 54), (88, 76), (87, 96), (66, 82)]),
        rect("steel", 38, 82, 62, 90),
        blob("main", [(50, -4), (64, 14), (72, 40), (70, 66), (63, 85), (37, 85), (30, 66), (28, 40), (36, 14)]),
        blob("trim", [(50, -4), (60, 8), (65, 18), (50, 21), (35, 18), (40, 8)], False),
        oval("white", 50, 41, 12, 12, edge=False), oval("screen", 50, 41, 8.5, 8.5),
        rect("dark", 32, 68, 68, 74, False),
    ]


def boat() -> list[Part]:
    """A sailing boat."""
    return [
        rect("wooddark", 47, 2, 52, 72, False), poly("trim", [(52, 0), (52, 10), (68, 5)], False),
        blob("cream", [(54, 10), (76, 36), (92, 64), (54, 64), (55, 36)]),
        blob("cream", [(45, 16), (45, 64), (12, 64), (32, 40)]),
        poly("main", [(0, 70), (104, 70), (88, 98), (18, 98)]),
        poly("dark", [(11, 87), (95, 87), (88, 98), (18, 98)], False),
        poly("light", [(0, 70), (104, 70), (102, 75), (3, 75)], False),
    ]


def balloon() -> list[Part]:
    """A hot air balloon with a basket."""
    return [
        stroke("wooddark", [(37, 66), (43, 84)], 2.5, False), stroke("wooddark", [(63, 66), (57, 84)], 2.5, False),
        slab("wood", 41, 82, 59, 98, 3),
        blob("main", [(50, 0), (76, 8), (89, 32), (80, 54), (62, 74), (38, 74), (20, 54), (11, 32), (24, 8)]),
        blob("light", [(36, 4), (44, 1), (34, 34), (42, 74), (38, 74), (26, 58), (21, 34)], False),
        blob("light", [(64, 4), (56, 1), (66, 34), (58, 74), (62, 74), (74, 58), (79, 34)], False),
        rect("dark", 38, 70, 62, 75, False),
    ]
