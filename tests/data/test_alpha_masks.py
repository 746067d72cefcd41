"""Masks from the alpha channels of images: `data.masks=alpha`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdft.data.datamodule import Images
from sdft.data.decode import EXIF_ORIENTATION, decode, decode_alpha
from sdft.data.inventory import Inventory
from sdft.data.masks import check_masks
from sdft.data.scan import scan
from sdft.data.scan_cache import ScanCache
from sdft.data.sources import Folder, Mix
from sdft.errors import UserError


def cut_out() -> Image.Image:
    """64 x 96, red; alpha 0 in the left third, 51 (a fifth) in the middle, 255 on the right."""
    picture = Image.new("RGBA", (96, 64), (255, 0, 0, 0))
    picture.paste((255, 0, 0, 51), (32, 0, 64, 64))
    picture.paste((255, 0, 0, 255), (64, 0, 96, 64))
    return picture


def stored(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One picture with an alpha channel, and one without."""
    folder = tmp_path / "in"
    folder.mkdir()
    cut_out().save(folder / "0.png")
    Image.new("RGB", (96, 64), (0, 0, 255)).save(folder / "1.png")
    for i in range(2):
        (folder / f"{i}.txt").write_text("a thing")
    return folder


def images(root: Path, **options) -> Images:
    source = Folder(str(root), "all")
    return Images(source, source, 1, 32, **{"masks": "alpha", "cache": "off"} | options)


def test_by_hand(root: Path) -> None:
    """64 x 96 is resized to 32 x 48, of which the columns 8 to 40 are kept: 8 of alpha 0, 16 of a fifth, 8 of 1."""
    data = images(root)
    assert data.num_masked == 1
    mask = data.train_set[0, 0]["mask_B1HW"]
    assert mask.shape == (1, 32, 32)
    assert mask[0, :, [0, 6]].unique().tolist() == [0]
    torch.testing.assert_close(mask[0, :, 9:23], torch.full((32, 14), 0.2))
    assert mask[0, :, [25, 31]].unique().tolist() == [1]
    assert data.train_set[1, 0]["mask_B1HW"].unique().tolist() == [1], "an image without alpha counts whole"
    assert "mask_B1HW" not in data.validation_set[0, 0]


def test_it_is_flipped_and_cropped_with_the_image(root: Path) -> None:
    """Where the picture is white, its transparency was, in every visit and at every side."""
    data = images(root, flip=True, crop="random", sizes={32: 1, 64: 1}).train_set
    for item in data.items_of_samples()[0]:
        for visit in range(6):
            example = data[item, visit]
            green = (example["pixels_BCHW"][1] + 1) / 2  # red on white: 1 minus alpha
            assert (1 - green - example["mask_B1HW"][0]).abs().mean() < 0.02


def test_pixels_are_those_of_a_run_without_masks(root: Path) -> None:
    with_masks, without = images(root).train_set, images(root, masks=False).train_set
    for index in range(2):
        assert torch.equal(with_masks[index, 0]["pixels_BCHW"], without[index, 0]["pixels_BCHW"])


def test_formats(tmp_path: Path) -> None:
    """WebP, grey with alpha, a palette with a transparent colour, and EXIF orientation; a JPEG has none."""
    expected = np.asarray(cut_out().getchannel("A"))
    assert np.array_equal(decode_alpha(stored(cut_out())), expected)
    assert np.array_equal(decode_alpha(stored(cut_out(), "WEBP", lossless=True, exact=True)), expected)
    assert np.array_equal(decode_alpha(stored(cut_out().convert("LA"))), expected)
    palette = Image.new("P", (96, 64), 0)
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.paste(1, (0, 0, 32, 64))
    found = decode_alpha(stored(palette, transparency=0))
    assert (found[0, 0], found[0, 40]) == (255, 0)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    turned = stored(cut_out(), exif=exif)
    assert decode_alpha(turned).shape == decode(turned).shape[:2] == (96, 64)
    assert decode_alpha(turned)[:32].max() == 0
    assert decode_alpha(stored(cut_out().convert("RGB"), "JPEG")) is None


def test_masks_in_files_are_not_read(root: Path) -> None:
    Image.new("L", (96, 64), 0).save(root / "1.mask.png")
    assert images(root).train_set[1, 0]["mask_B1HW"].min() == 1
    assert images(root, masks=True).train_set[1, 0]["mask_B1HW"].max() == 0


def test_it_goes_through_mixes(root: Path) -> None:
    source = Mix({"a": Folder(str(root), "all")}, repeats={"a": 2})
    assert check_masks(source, scan(source, ScanCache(str(root / "seen"))), "alpha") == 2


def test_sets_without_transparency_are_refused(root: Path) -> None:
    cut_out().convert("RGB").save(root / "0.png")
    with pytest.raises(UserError, match=r"data\.masks=alpha: no image has an alpha channel; save them as PNG or WebP"):
        images(root)
    cut_out().convert("RGB").convert("RGBA").save(root / "0.png")
    with pytest.raises(UserError, match=r"data\.masks=alpha: the alpha channels of all 1 images are opaque everywhere"):
        images(root)


def test_a_resumed_run_sees_that_a_channel_was_edited(root: Path) -> None:
    def inventory(masks) -> Inventory:
        source = Folder(str(root), "all")
        return Inventory.of(source, scan(source, ScanCache(str(root / "seen"))), masks)

    before = inventory("alpha")
    assert inventory("alpha").changes_since(Inventory.from_state(before.state())) == []
    assert inventory(False).changes_since(before) == ["2 edited (0.png, 1.png)"]
    Image.new("L", (96, 64), 0).save(root / "1.mask.png")  # not read
    picture = cut_out()
    picture.putalpha(Image.new("L", picture.size, 7))
    picture.save(root / "0.png")
    assert inventory("alpha").changes_since(before) == ["1 edited (0.png)"]
