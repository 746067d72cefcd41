"""Which size a picture is trained at, worked by hand: 1024 x 1024 pixels in steps of 64."""

from __future__ import annotations

import pytest

from sdft.data.buckets import bucket_sizes, covered_bucket, nearest_bucket
from sdft.data.images import plan_crop

WIDE = [(512, 2048), (576, 1792), (640, 1600), (704, 1472), (768, 1344), (832, 1216), (896, 1152), (960, 1088)]
CASES = [
    # original, bucket, resized, (top, left); all (h, w)
    ((1000, 1500), (832, 1216), (832, 1248), (0, 16)),
    ((1500, 1000), (1216, 832), (1248, 832), (16, 0)),
    ((1080, 1920), (768, 1344), (768, 1365), (0, 11)),
    ((1024, 1024), (1024, 1024), (1024, 1024), (0, 0)),
    ((1, 1), (1024, 1024), (1024, 1024), (0, 0)),
    ((4000, 37), (2048, 512), (55351, 512), (26652, 0)),
    ((719, 1281), (768, 1344), (768, 1368), (0, 12)),
    ((1023, 1025), (1024, 1024), (1024, 1026), (0, 1)),
    ((333, 500), (832, 1216), (832, 1249), (0, 17)),
    ((600, 1000), (768, 1344), (806, 1344), (19, 0)),
]


def test_the_sizes_of_sdxl() -> None:
    """1048576 // 576 = 1820, floored to 1792, and so on; each shape also on its side."""
    assert bucket_sizes(1024, 64) == [*((w, h) for h, w in WIDE), (1024, 1024), *reversed(WIDE)]


def test_the_sizes_of_nano() -> None:
    """4096 // 48 = 85, floored to 80."""
    assert bucket_sizes(64, 16) == [(128, 32), (80, 48), (64, 64), (48, 80), (32, 128)]


@pytest.mark.parametrize(("side", "step"), [(1024, 64), (768, 64), (512, 32), (64, 16)])
def test_no_size_can_grow(side: int, step: int) -> None:
    for h, w in bucket_sizes(side, step):
        assert h % step == w % step == 0
        assert h * w <= side * side < min((h + step) * w, h * (w + step))


@pytest.mark.parametrize(("original", "bucket", "resized", "corner"), CASES)
def test_awkward_sizes(original, bucket, resized, corner) -> None:
    assert nearest_bucket(original, bucket_sizes(1024, 64)) == bucket
    cut = plan_crop(original, bucket)
    assert cut.resized_hw == resized
    assert (cut.top, cut.left) == corner
    assert cut.time_ids_6 == (*original, *corner, *bucket)


@pytest.mark.parametrize(
    ("hw", "expected"),
    [
        ((1000, 1500), (832, 1216)),
        ((600, 900), (576, 896)),
        ((1100, 900), (1088, 896)),
        ((2000, 700), (1792, 576)),
        ((40, 30), (64, 64)),
    ],
)
def test_small_images_are_not_enlarged(hw: tuple[int, int], expected: tuple[int, int]) -> None:
    assert covered_bucket(hw, bucket_sizes(1024, 64), 64) == expected
