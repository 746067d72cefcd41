"""Drawings of a product and a character that nano was not trained on, for experiments that teach it a subject.

Knows them as parts with roles, as `shapes` does; their colours are their own, except `main`.
"""

from __future__ import annotations

from sdft.data.toy.geometry import Part, blob, oval, poly, slab, stroke


def sneaker() -> list[Part]:
    """A high sneaker seen from the side, the toe to the right: white sole and toe cap, yellow stripes."""
    laces = [stroke("white", [(46 + 9 * i, 22 + 8 * i), (57 + 9 * i, 17 + 8 * i)], 3.5, False) for i in range(3)]
    return [
        blob("main", [(8, 66), (9, 42), (10, 6), (24, 2), (40, 4), (50, 22), (70, 40), (96, 46), (110, 56), (112, 66),
            (60, 70)]),
        poly("screen", [(8, 40), (9, 8), (18, 6), (19, 40)], False),
        blob("white", [(92, 45), (108, 52), (113, 66), (90, 66)]),
        stroke("yellow", [(34, 62), (46, 36)], 6, False), stroke("yellow", [(48, 62), (60, 42)], 6, False),
        *laces,
        slab("white", 4, 64, 116, 78, 6),
        slab("screen", 4, 74, 116, 79, 2, False),
    ]


def wizard() -> list[Part]:
    """A bearded wizard in a wide robe with a pointed hat, a glowing staff in each picture."""
    return [
        stroke("wood", [(100, 20), (100, 100)], 7), oval("lamp", 100, 14, 13, 13),
        blob("main", [(50, 42), (26, 52), (2, 96), (50, 102), (98, 96), (74, 52)]),
        blob("main", [(68, 52), (100, 60), (98, 72), (70, 70)]),
        oval("cream", 100, 66, 8, 7),
        stroke("yellow", [(10, 86), (50, 94), (90, 86)], 8, False),
        oval("cream", 50, 40, 24, 20),
        blob("white", [(24, 44), (50, 52), (76, 44), (70, 72), (50, 90), (30, 72)]),
        oval("ink", 41, 38, 4.5, 5.5, edge=False), oval("ink", 59, 38, 4.5, 5.5, edge=False),
        poly("main", [(16, 30), (54, -24), (84, 30)]),
        slab("yellow", 6, 24, 94, 35, 5),
        oval("yellow", 52, 8, 7, 7, edge=False),
    ]
