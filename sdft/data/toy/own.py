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
    """A bearded wizard in a robe with a pointed hat and a staff."""
    return [
        stroke("wood", [(88, 26), (88, 100)], 5), oval("lamp", 88, 20, 9, 9),
        blob("main", [(50, 40), (32, 52), (16, 98), (50, 101), (84, 98), (68, 52)]),
        blob("main", [(64, 52), (90, 58), (88, 66), (66, 68)]),
        oval("cream", 88, 62, 6, 5),
        stroke("yellow", [(24, 90), (50, 94), (76, 90)], 5, False),
        oval("cream", 50, 38, 16, 15),
        blob("white", [(34, 42), (50, 50), (66, 42), (62, 66), (50, 84), (38, 66)]),
        oval("ink", 44, 36, 2.6, 3.2, edge=False), oval("ink", 56, 36, 2.6, 3.2, edge=False),
        poly("main", [(28, 30), (54, -14), (72, 30)]),
        slab("yellow", 24, 26, 76, 33, 3),
        oval("yellow", 52, 10, 4.5, 4.5, edge=False),
    ]
