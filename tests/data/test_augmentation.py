"""Random changes of images: where each pixel goes, the same at every visit of that number, live and cached."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdft.data.augmentation import Augmentation, Colours, Geometry, recoloured
from sdft.data.cache import Cache
from sdft.data.datamodule import Images
from sdft.data.dataset import ImageDataset
from sdft.data.images import crop_image, crop_mask, plan_crop, turned_box
from sdft.data.sources import Folder
from sdft.errors import UserError
from sdft.rng import Draws

EVERYTHING = Augmentation(zoom=0.3, rotation=20, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)


class TestGeometry:
    @pytest.mark.parametrize(
        ("angle", "hw"), [(0, (30, 40)), (90, (40, 30)), (-90, (40, 30)), (45, (50, 50)), (30, (46, 50))]
    )
    def test_the_box_around_a_turned_rectangle(self, angle: float, hw: tuple[int, int]) -> None:
        assert turned_box((30, 40), angle) == hw

    def test_a_quarter_turn(self) -> None:
        """Clockwise, as a photograph on a table; a sine is rounded, so one level of 255 may be lost."""
        image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        plan = plan_crop((40, 40), (40, 40), geometry=Geometry(angle=90))
        expected = np.ascontiguousarray(np.rot90(image, -1))
        difference = crop_image(image, plan) - crop_image(expected, plan_crop((40, 40), (40, 40)))
        assert difference.abs().max() <= 1.01 / 127.5

    def test_nothing_is_filled_in(self) -> None:
        """Of a white image, every pixel of every turned crop is white; and the crop is as large as it can be."""
        white = np.full((60, 90, 3), 255, np.uint8)
        for angle in np.linspace(-45, 45, 19):
            for at in ((0, 0), (0.5, 0.5), (1, 1)):
                plan = plan_crop((60, 90), (32, 48), at, geometry=Geometry(angle=float(angle)))
                assert crop_image(white, plan).min() == 1
                box = turned_box((32, 48), float(angle))
                assert box[0] == plan.resized_hw[0] or box[1] == plan.resized_hw[1]

    def test_zoom_and_conditioning(self) -> None:
        """A crop of 32 x 32 of an image of 64 x 64, zoomed by 1.5: resized to 48, from 8 on."""
        plan = plan_crop((64, 64), (32, 32), geometry=Geometry(zoom=1.5))
        assert (plan.resized_hw, plan.top, plan.left) == ((48, 48), 8, 8)
        assert plan.time_ids_6 == (64, 64, 8, 8, 32, 32)

    def test_a_mask_goes_where_its_image_goes(self) -> None:
        image = np.zeros((64, 80, 3), np.uint8)
        image[20:40, 30:60] = 255
        plan = plan_crop((64, 80), (48, 48), (0.3, 0.8), flip=True, geometry=Geometry(1.2, 17))
        pixels, mask = crop_image(image, plan), crop_mask(image[..., 0], plan)
        assert mask.shape == (1, 48, 48)
        assert 0.05 < mask.mean() < 0.95
        assert ((pixels.mean(0) + 1) / 2 - mask[0]).abs().mean() < 0.02


class TestColours:
    def test_by_hand(self) -> None:
        image = np.full((4, 4, 3), (100, 50, 0), np.uint8)
        assert recoloured(image, Colours()) is image
        assert recoloured(image, Colours(brightness=1.5))[0, 0].tolist() == [150, 75, 0]
        assert recoloured(image, Colours(saturation=0.0))[0, 0].tolist() == [59, 59, 59], "its luma"
        red = np.full((4, 4, 3), (255, 0, 0), np.uint8)
        assert recoloured(red, Colours(hue=1 / 3))[0, 0].tolist() == pytest.approx([0, 255, 0], abs=4)

    def test_ranges(self) -> None:
        """Uniform within 1 plus or minus the range, over 400 visits."""
        found = [EVERYTHING.colours(Draws(0, ["a"], [visit])) for visit in range(400)]
        for name, (low, high) in {"brightness": (0.7, 1.3), "saturation": (0.7, 1.3), "hue": (-0.1, 0.1)}.items():
            values = np.array([getattr(colours, name) for colours in found])
            assert low <= values.min() < low + 0.05 * (high - low)
            assert high >= values.max() > high - 0.05 * (high - low)
            assert abs(values.mean() - (low + high) / 2) < 0.05 * (high - low)
        turns = np.array([EVERYTHING.geometry(Draws(0, ["a"], [visit])) for visit in range(400)])
        assert turns.min(0) == pytest.approx([1, -20], abs=1)
        assert turns.max(0) == pytest.approx([1.3, 20], abs=1)


class TestVisits:
    def test_each_visit_is_another_and_always_the_same(self, tiny_source) -> None:
        pictures = ImageDataset(tiny_source(2, hw=(48, 48)), (32, 32), seed=1, augmentation=EVERYTHING)
        pixels = [pictures[0, visit]["pixels_BCHW"] for visit in range(4)]
        assert all(not torch.equal(a, b) for a, b in itertools.pairwise(pixels))
        assert all(torch.equal(pictures[0, visit]["pixels_BCHW"], pixels[visit]) for visit in (3, 1, 0, 2))
        plain = ImageDataset(tiny_source(2, hw=(48, 48)), (32, 32), seed=9)[0, 0]["pixels_BCHW"]
        assert torch.equal(pictures.variant(0, False)["pixels_BCHW"], plain), "validation sees the image itself"

    def test_variants_come_in_turn(self, tiny_source) -> None:
        pictures = ImageDataset(
            tiny_source(1, hw=(48, 48)), (32, 32), seed=1, crop="random", augmentation=EVERYTHING, variants=3
        )
        pixels = [pictures[0, visit]["pixels_BCHW"] for visit in range(7)]
        assert torch.equal(pixels[0], pixels[3])
        assert torch.equal(pixels[1], pixels[4])
        assert torch.equal(pixels[0], pixels[6])
        assert not torch.equal(pixels[0], pixels[1])
        assert not torch.equal(pixels[1], pixels[2])

    @pytest.mark.parametrize("cache", ["ram", "disk"])
    def test_cached_variants_are_the_live_ones(self, cache: str, tiny_source, tmp_path: Path) -> None:
        """With flips, random crops and all changes; moments that are the pixels themselves."""
        source = tiny_source(3, hw=(48, 40))
        options = {"crop": "random", "flip": True, "augmentation": EVERYTHING, "variants": 2}
        data = Images(source, source, 2, 32, cache=cache, cache_dir=str(tmp_path / "cache"), **options)
        live = Images(source, source, 2, 32, cache="off", **options).train_set
        vae = torch.nn.Linear(1, 1)
        data.encode_once(lambda pixels: pixels.clone(), torch.device("cpu"), vae=vae)
        assert len(data.train_set.moments) == 3 * 2 * 2
        for index in range(3):
            for visit in range(6):
                cached, expected = data.train_set[index, visit], live[index, visit]
                assert torch.equal(cached["moments_BCHW"], expected["pixels_BCHW"])
                assert torch.equal(cached["time_ids_B6"], expected["time_ids_B6"])
        if cache == "disk":
            assert len(Cache(tmp_path / "cache")) == 3 * 2 * 2 + 3, "and three of validation"

    def test_a_cache_needs_a_number_of_variants(self, tiny_source) -> None:
        source = tiny_source(2)
        with pytest.raises(UserError, match=r"set data\.variants=N"):
            Images(source, source, 2, 32, cache="ram", augmentation=Augmentation(rotation=5))


def test_what_a_caption_says_of_sides_stays_true(tmp_path: Path) -> None:
    """Such images are not flipped, and their number is told."""
    texts = ["a cat on the left", "a bright red cat", "the rightmost cup", "leftovers on a plate", "Left-handed"]
    for i, text in enumerate(texts):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(text)
    source = Folder(str(tmp_path), "all")
    data = Images(source, source, 2, 32, flip=True, cache="off")
    plain = Images(source, source, 2, 32, cache="off").train_set
    flipped = {
        i for i in range(5) for visit in range(20)
        if not torch.equal(data.train_set[i, visit]["pixels_BCHW"], plain[i, 0]["pixels_BCHW"])
    }  # fmt: skip
    assert flipped == {1, 3}
    assert data.left_out == ["3 x not flipped: the caption says left or right"]
