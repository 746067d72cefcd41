"""What scenes attach to drawings: hats, crowns and scarves, and riders.

Knows where heads, necks and seats are. Must not know colours, looks or pixels.
"""

from __future__ import annotations

from sdft.data.toy.geometry import Part, curve, moved, oval, poly, rect, slab, stroke

HEADS: dict[str, tuple[float, float, float]] = {
    "cat": (50, 14, 40),
    "dog": (75, 11, 34),
    "rabbit": (50, 23, 36),
    "owl": (50, 12, 46),
    "robot": (50, 12, 44),
    "bird": (28, 13, 24),
    "horse": (86, 0, 24),
}
"""The top of each head and its width, in the coordinates of the drawing: where a hat or a crown goes."""
NECKS: dict[str, tuple[float, float, float, float]] = {
    "cat": (28, 56, 72, 56),
    "rabbit": (30, 62, 70, 62),
    "robot": (28, 47, 72, 47),
    "dog": (58, 44, 82, 50),
    "bird": (16, 43, 46, 40),
    "horse": (60, 40, 82, 40),
    "owl": (22, 56, 78, 56),
}
"""The two ends of each neck, where a scarf goes."""


def clothes(subject: str, worn: str) -> list[Part]:
    """A hat, a crown or a scarf on a subject of HEADS; roles `wear` and `wear_dark`."""
    if worn == "scarf":
        x0, y0, x1, y1 = NECKS[subject]
        middle, low = (x0 + x1) / 2, max(y0, y1)
        return [
            curve("wear", [(x0, y0), (middle, low + 5), (x1, y1)], 11),
            slab("wear_dark", x1 - 16, low + 2, x1 - 5, low + 26, 2),
            *[
                stroke("white", [(x1 - 14 + 3.5 * k, low + 22), (x1 - 14 + 3.5 * k, low + 27)], 1.4, False)
                for k in range(3)
            ],
        ]
    x, y, width = HEADS[subject]
    s = width / 40.0
    if worn == "crown":
        points = [(-18, 2), (-20, -20), (-10, -10), (0, -24), (10, -10), (20, -20), (18, 2)]
        gems = [oval("redlamp", dx, -4, 2.4, 2.4, edge=False) for dx in (-9, 0, 9)]
        return moved(
            [
                poly("gold", points),
                *gems,
                *[oval("gold", dx, dy, 2.6, 2.6) for dx, dy in ((-20, -21), (0, -25), (20, -21))],
            ],
            s,
            x,
            y + 2,
        )
    hat = [
        slab("wear", -17, -30, 17, 0, 4),
        rect("wear_dark", -17, -10, 17, -3, False),
        slab("wear", -28, -4, 28, 4, 3),
    ]
    return moved(hat, s, x, y + 3)


SEATS: dict[str, tuple[float, float]] = {
    "car": (66, 21),
    "chair": (50, 62),
    "mushroom": (50, 3),
    "train": (20, 14),
    "horse": (34, 40),
}
"""The subjects that carry others, and where."""
