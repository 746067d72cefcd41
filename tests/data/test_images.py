"""How a picture is cut, and that the micro-conditioning tells the truth about it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sdft.data.images import CropPlan, crop_image, plan_crop, to_uint8

AWKWARD = [(1, 1), (1, 1000), (333, 500), (63, 65), (64, 64), (1023, 1025), (719, 1281), (4000, 37)]
TARGETS = [(64, 64), (64, 96), (1024, 1024), (896, 1152)]


def picture(h: int, w: int) -> np.ndarray:
    """Row, column and their sum as colours: no two nearby pixels are alike."""
    rows, columns = np.mgrid[:h, :w]
    return np.stack([rows * 7, columns * 5, rows * 3 + columns * 11], axis=-1).astype(np.uint8)


class TestGolden:
    """The values of shared/SDXL_FACTS.md; kohya has the axes the wrong way round, on non-square pictures it shows."""

    def test_1500_x_1000_into_1024_x_1024(self) -> None:
        cut = plan_crop((1000, 1500), (1024, 1024))
        assert cut.resized_hw == (1024, 1536)
        assert (cut.top, cut.left) == (0, 256)
        assert cut.time_ids_6 == (1000, 1500, 0, 256, 1024, 1024)

    def test_1000_x_1000_into_1152_x_896(self) -> None:
        cut = plan_crop((1000, 1000), (896, 1152))
        assert cut.resized_hw == (1152, 1152)
        assert (cut.top, cut.left) == (128, 0)
        assert cut.time_ids_6 == (1000, 1000, 128, 0, 896, 1152)

    def test_a_picture_of_the_target_size_is_left_alone(self) -> None:
        assert plan_crop((64, 96), (64, 96)) == CropPlan((64, 96), (64, 96), 0, 0, (64, 96), flip=False)

    def test_a_flip_mirrors_left(self) -> None:
        """1500 x 1000 at a quarter of the 512 px of slack: left 128, mirrored 1536 - 128 - 1024 = 384."""
        upright, mirrored = (plan_crop((1000, 1500), (1024, 1024), at=(0.5, 0.25), flip=flip) for flip in (False, True))
        assert upright.time_ids_6 == (1000, 1500, 0, 128, 1024, 1024)
        assert mirrored.left == 128
        assert mirrored.time_ids_6 == (1000, 1500, 0, 384, 1024, 1024)

    def test_a_small_picture_is_enlarged_and_says_its_own_size(self) -> None:
        cut = plan_crop((32, 48), (64, 64))
        assert cut.resized_hw == (64, 96)
        assert cut.time_ids_6 == (32, 48, 0, 16, 64, 64)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("original", AWKWARD)
@pytest.mark.parametrize("at", [(0.0, 0.0), (0.5, 0.5), (0.999999, 0.3), (1.0, 1.0)])
def test_the_cut_lies_inside_the_smallest_cover(original, target, at) -> None:
    """The window never leaves the resized picture, one side fits exactly, and the picture keeps its shape."""
    for flip in (False, True):
        cut = plan_crop(original, target, at, flip)
        (h, w), (target_h, target_w) = cut.resized_hw, target
        assert h >= target_h
        assert w >= target_w
        assert h == target_h or w == target_w
        assert 0 <= cut.top <= h - target_h
        assert 0 <= cut.left <= w - target_w
        assert 0 <= cut.time_ids_6[3] <= w - target_w
        scale = max(target_h / original[0], target_w / original[1])
        assert abs(h - original[0] * scale) <= 0.5 + 1e-6
        assert abs(w - original[1] * scale) <= 0.5 + 1e-6
        if at == (0.0, 0.0):
            assert (cut.top, cut.left) == (0, 0)
        if at == (1.0, 1.0):
            assert (cut.top, cut.left) == (h - target_h, w - target_w)


def test_random_crops_reach_both_ends_evenly() -> None:
    """Slack of 3 columns: four places; the two at the ends get half the share of a rounded fraction."""
    fractions = (np.arange(6000) + 0.5) / 6000
    lefts = np.bincount([plan_crop((64, 67), (64, 64), (0.5, f)).left for f in fractions], minlength=4)
    assert lefts.tolist() == [1000, 2000, 2000, 1000]


class TestPixels:
    @pytest.mark.parametrize("flip", [False, True])
    def test_without_resizing_they_are_the_pictures_own(self, flip: bool) -> None:
        image = picture(48, 64)
        pixels = crop_image(image, CropPlan((48, 64), (48, 64), 10, 20, (32, 24), flip))
        window = image[10:42, 20:44].astype(np.float64) / 127.5 - 1
        expected = torch.tensor(window[:, ::-1].copy() if flip else window).permute(2, 0, 1)
        assert (pixels.shape, pixels.dtype) == ((3, 32, 24), torch.float32)
        torch.testing.assert_close(pixels.double(), expected, rtol=0, atol=1e-7)

    @pytest.mark.parametrize("flip", [False, True])
    @pytest.mark.parametrize(("original", "target"), [((50, 90), (32, 32)), ((20, 30), (64, 32)), ((33, 77), (64, 96))])
    def test_with_resizing_they_are_pils_lanczos(self, original, target, flip: bool) -> None:
        image = picture(*original)
        cut = plan_crop(original, target, at=(0.3, 0.6), flip=flip)
        resized = Image.fromarray(image).resize(cut.resized_hw[::-1], Image.Resampling.LANCZOS)
        box = (cut.left, cut.top, cut.left + target[1], cut.top + target[0])
        direct = resized.crop(box)
        direct = direct.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else direct
        assert np.array_equal(to_uint8(crop_image(image, cut)[None])[0], np.asarray(direct))

    def test_black_and_white_are_the_ends_of_the_range(self) -> None:
        image = np.zeros((8, 8, 3), dtype=np.uint8)
        image[:, 4:] = 255
        pixels = crop_image(image, plan_crop((8, 8), (8, 8)))
        assert pixels[:, :, :4].unique().tolist() == [-1.0]
        assert pixels[:, :, 4:].unique().tolist() == [1.0]

    def test_a_flipped_cut_is_the_same_place_of_the_mirrored_picture(self) -> None:
        """What `time_ids_6` says of a flip: the window lies at its `left` in the mirrored picture."""
        image = picture(48, 64)
        flipped = plan_crop((48, 64), (48, 32), at=(0.5, 0.25), flip=True)
        *_, top, left, h, w = flipped.time_ids_6
        mirrored = np.ascontiguousarray(image[:, ::-1])
        assert torch.equal(
            crop_image(image, flipped), crop_image(mirrored, CropPlan((48, 64), (48, 64), top, left, (h, w), False))
        )

    def test_bytes_survive_the_way_there_and_back(self) -> None:
        every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
        assert np.array_equal(to_uint8(crop_image(every, plan_crop((16, 16), (16, 16)))[None])[0], every)

    def test_pixels_out_of_range_are_clipped(self) -> None:
        assert to_uint8(torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0]).view(1, 1, 1, 5)).flatten().tolist() == [
            0,
            0,
            128,
            255,
            255,
        ]
