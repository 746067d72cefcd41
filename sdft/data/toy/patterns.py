"""What covers a filled part: planks, metal, stone, stripes and spots.

Knows patterns as shares of a second colour. Must not know scenes, looks or what is covered.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def _wooden(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Planks with grain."""
    grain = 0.22 * (np.sin(9.0 * y + 1.5 * np.sin(1.3 * x)) > 0.55)
    return np.maximum(((y % 2.0) < 0.28) * 0.85, grain)


def _golden(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Light that runs across polished metal."""
    return 0.5 + 0.5 * np.sin(1.1 * (x + 0.8 * y))


def _stone(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Courses of blocks."""
    row = np.floor(y / 1.6)
    joints = ((y % 1.6) < 0.24) | (((x + 1.3 * (row % 2)) % 2.6) < 0.24)
    return 0.9 * joints


def _striped(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (((x + 0.3 * y) % 2.4) < 1.0).astype(float)


def _spotted(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    row = np.floor(y / 2.0)
    dx, dy = ((x + 1.15 * (row % 2)) % 2.3) - 1.15, (y % 2.0) - 1.0
    return (dx**2 + dy**2 < 0.45).astype(float)


PATTERNS: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {
    "wooden": ("dark", _wooden), "golden": ("light", _golden), "stone": ("dark", _stone), "striped": ("dark", _striped),
    "spotted": ("dark", _spotted),
}  # fmt: skip
"""Name -> the role of the second colour, and its share at x and y, in units of about a thirtieth of the image."""


def second_role(role: str, pattern: str) -> str:
    """The role of the second colour of a part; of the second subject of a scene, with its prefix."""
    return role.removesuffix("main") + PATTERNS[pattern][0]


def share(pattern: str, left: int, top: int, width: int, height: int, canvas: int) -> np.ndarray:
    """The share of the second colour, of shape (height, width), in a box of a canvas."""
    unit = canvas / 30.0
    y, x = np.mgrid[top : top + height, left : left + width] / unit
    return PATTERNS[pattern][1](x, y)
