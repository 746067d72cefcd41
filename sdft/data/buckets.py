"""Aspect-ratio buckets: training sizes of about one area, and the bucket of an image.

Sizes are (h, w) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sdft.errors import UserError

MOST_ELONGATED = 4.0
"""Longest over shortest side in the training sizes of SDXL (2048 x 512)."""


def bucket_sizes(side: int, step: int, most_elongated: float = MOST_ELONGATED) -> list[tuple[int, int]]:
    """The sizes in multiples of `step`, by aspect ratio, of at most side x side pixels, that cannot grow along an axis.

    The long side is limited by the area only, the short side is at least side / sqrt(most_elongated).
    """
    shortest = math.ceil(side / math.sqrt(most_elongated) / step) * step
    short_sides = range(max(shortest, step), side + 1, step)
    wide = [(short, side * side // short // step * step) for short in short_sides]
    return sorted({*wide, *((w, h) for h, w in wide)}, key=lambda hw: hw[1] / hw[0])


def check_sizes(side: int, bucket_step: int | None, key: str = "size") -> None:
    """Raise UserError for sizes in pixels that the latents cannot have. key: of the side in the config."""
    named = f"{key}={side}" if key == "size" else f"{key}: {side}"
    if side % 16:
        nearest = max(64, round(side / 64) * 64)
        remedy = f"size={nearest}" if key == "size" else nearest
        raise UserError(f"{named}: must be a multiple of 16, and of 64 for SDXL; try {remedy}")
    if bucket_step and (bucket_step % 16 or side % bucket_step):
        place = named if key == "size" else f"{side}, of {key}"
        raise UserError(f"data.bucket_step={bucket_step}: must be a multiple of 16 that divides {place}; 64 is SDXL's")


def nearest_bucket(original_hw: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket with the nearest aspect ratio, by the difference of the logarithms of width over height."""
    h, w = original_hw
    return min(sizes, key=lambda hw: (abs(math.log(w / h) - math.log(hw[1] / hw[0])), hw))


def covered_bucket(original_hw: tuple[int, int], sizes: Sequence[tuple[int, int]], step: int) -> tuple[int, int]:
    """The nearest bucket if the image covers it, else the largest size in multiples of `step` that it covers, at least
    one step."""
    bucket = nearest_bucket(original_hw, sizes)
    if all(side >= target for side, target in zip(original_hw, bucket, strict=True)):
        return bucket
    h, w = (max(min(side, target) // step, 1) * step for side, target in zip(original_hw, bucket, strict=True))
    return h, w
