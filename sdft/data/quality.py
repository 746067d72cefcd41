"""Flags images that are likely to harm a training: blurred, framed, small, of extreme shape, nearly there already.

Knows pixels and sizes only. A flag is a reason to look at an image, never a reason to drop it by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from scipy.ndimage import laplace

SHARP_SIDE = 512
"""Sharpness is measured at this longer side, so that large and small images compare."""
BLURRED = 30.0
"""Variance of the Laplacian of grey values at `SHARP_SIDE` (Pertuz et al. 2013 compare such measures), below which an
image is worth a look. A third of the 100 that is often used; not calibrated on photographs."""
WIDEST = 2.5
"""Ratio of the sides above which an image is worth a look: panoramas and strips. SDXL's own buckets reach 4 : 1."""
BAND = 0.03
"""Share of a side that a frame covers at least."""
FLAT, STEP = 3.0, 12.0
"""Grey levels: standard deviation within a frame, and the step behind it."""


def flags_of(image_HWC: np.ndarray, target_hw: tuple[int, int], resized_hw: tuple[int, int]) -> list[str]:
    """Why an image should be looked at; empty if nothing is found.

    image_HWC: uint8 RGB. target_hw, resized_hw: the training size, and the size to which the image is resized for it.
    """
    h, w = image_HWC.shape[:2]
    found = []
    if (sharp := sharpness(image_HWC)) < BLURRED:
        found.append(f"blurred (sharpness {sharp:.0f}, below {BLURRED:.0f})")
    if framed := frame_of(image_HWC):
        found.append(f"a frame or bars ({framed})")
    if (factor := resized_hw[0] / h) > 1.05:
        found.append(f"small ({w} x {h}, enlarged by {factor:.2g} to train at {target_hw[1]} x {target_hw[0]})")
    if (ratio := max(h, w) / min(h, w)) > WIDEST:
        kept = target_hw[0] * target_hw[1] / (resized_hw[0] * resized_hw[1])
        found.append(f"extreme shape ({ratio:.2g} : 1, {kept:.0%} of it is trained on)")
    return found


def sharpness(image_HWC: np.ndarray) -> float:
    """Variance of the Laplacian of the grey image, reduced to `SHARP_SIDE`."""
    picture = Image.fromarray(image_HWC).convert("L")
    picture.thumbnail((SHARP_SIDE, SHARP_SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return float(laplace(np.asarray(picture, np.float32)).var())


def frame_of(image_HWC: np.ndarray) -> str | None:
    """Which sides have a flat band that ends at a straight edge, as letterboxes, frames and stamped borders have; None
    without two opposite ones. A plain background ends nowhere in a straight line, so it is none."""
    grey_HW = np.asarray(Image.fromarray(image_HWC).convert("L"), np.float32)
    turned = {"top": grey_HW, "bottom": grey_HW[::-1], "left": grey_HW.T, "right": grey_HW.T[::-1]}
    sides = [side for side, rows_NM in turned.items() if has_band(rows_NM)]
    for pair in (["top", "bottom"], ["left", "right"]):
        if set(pair) <= set(sides):
            return ", ".join(sides)
    return None


def has_band(rows_NM: np.ndarray) -> bool:
    """Whether the first rows are of one flat colour, and the next is another along most of its length."""
    flat_N = np.abs(rows_NM - np.median(rows_NM[0])).mean(1) < FLAT
    if not flat_N[0] or flat_N.all():
        return False
    end = int(np.argmin(flat_N))
    if not BAND * len(rows_NM) <= end < len(rows_NM) / 2:
        return False
    inside_M = rows_NM[min(end + 1, len(rows_NM) - 1)]
    return bool((np.abs(inside_M - np.median(rows_NM[0])) > STEP).mean() > 0.6)


def to_leave_out(groups: Sequence[Sequence[str]], sizes: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Of each group of images that are nearly the same, all but the one with the most pixels, with the one to keep."""
    found: dict[str, str] = {}
    for group in groups:
        best = max(group, key=lambda key: (sizes[key][0] * sizes[key][1], [-ord(letter) for letter in key]))
        found |= {key: best for key in group if key != best}
    return found
