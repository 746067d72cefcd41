"""Images that are flagged before a training, the page of them, and sets without those that a file names."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from sdft.data import __main__ as commands
from sdft.data import summary
from sdft.data.datamodule import Images
from sdft.data.exclusions import without
from sdft.data.quality import flags_of, frame_of, sharpness, to_leave_out
from sdft.data.sources import Folder, Mix
from sdft.errors import UserError


def photo(w: int = 300, h: int = 200, seed: int = 0) -> Image.Image:
    """Something with edges of all sizes."""
    g = np.random.default_rng(seed)
    picture = Image.new("RGB", (w, h), tuple(g.integers(60, 200, 3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(60):
        x, y, r = g.integers(0, w), g.integers(0, h), g.integers(3, 40)
        draw.ellipse((x - r, y - r, x + r, y + r), tuple(g.integers(0, 256, 3)))
    return picture


def product() -> Image.Image:
    """A thing before a plain background."""
    picture = Image.new("RGB", (300, 300), "white")
    ImageDraw.Draw(picture).ellipse((60, 40, 240, 260), (180, 30, 40))
    return picture


def framed(picture: Image.Image, top: int, left: int, colour: str = "black") -> Image.Image:
    whole = Image.new("RGB", (picture.width + 2 * left, picture.height + 2 * top), colour)
    whole.paste(picture, (left, top))
    return whole


@pytest.mark.parametrize(
    ("picture", "sides"),
    [
        (photo(), None),
        (product(), None),
        (framed(photo(), 30, 0), "top, bottom"),
        (framed(photo(), 0, 40, "white"), "left, right"),
        (framed(photo(), 25, 25, "grey"), "top, bottom, left, right"),
        (framed(photo(), 2, 0), None),
        (Image.new("RGB", (80, 80), "red"), None),
    ],
)
def test_frames_are_told_from_plain_backgrounds(picture: Image.Image, sides: str | None) -> None:
    assert frame_of(np.asarray(picture)) == sides


def test_a_blurred_picture_is_told_at_any_size() -> None:
    for size in ((300, 200), (1500, 1000)):
        sharp = photo(*size)
        blurred = sharp.filter(ImageFilter.GaussianBlur(size[0] / 60))
        assert sharpness(np.asarray(sharp)) > 10 * sharpness(np.asarray(blurred))
        assert not flags_of(np.asarray(sharp), size[::-1], size[::-1])
        assert flags_of(np.asarray(blurred), size[::-1], size[::-1])[0].startswith("blurred (sharpness")


def test_small_and_extreme_pictures_are_told() -> None:
    image = np.asarray(photo(300, 100))
    assert flags_of(image, (192, 256), (192, 576)) == [
        "small (300 x 100, enlarged by 1.9 to train at 256 x 192)",
        "extreme shape (3 : 1, 44% of it is trained on)",
    ]


def test_the_largest_of_those_that_are_nearly_the_same_is_kept() -> None:
    sizes = {"a": (10, 10), "b": (20, 10), "c": (10, 20), "d": (1, 1)}
    assert to_leave_out([["a", "c", "b"]], sizes) == {"a": "b", "c": "b"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six good pictures; one of them again, smaller; one blurred; one framed."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    pictures = {f"good{i}": photo(seed=i) for i in range(6)}
    pictures |= {"again": photo(seed=0).resize((240, 160)), "framed": framed(photo(seed=8), 30, 0)}
    pictures["blurred"] = photo(seed=9).filter(ImageFilter.GaussianBlur(6))
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name}")
    return folder


def check(root: Path, out: Path, monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr(
        sys, "argv", ["check", f"data.root={root}", f"out={out}", "size=64", "data.bucket_step=16", *words]
    )
    commands.check()
    return capsys.readouterr().out


def test_check_shows_them_on_a_page(root: Path, tmp_path: Path, monkeypatch, capsys, open_page, open_again) -> None:
    told = check(root, tmp_path / "out", monkeypatch, capsys)
    lines = {line.split("  ")[0].strip(): line for line in told.splitlines()}
    assert lines["to look at"].endswith("1 a frame or bars, 1 blurred")
    assert "style" in told
    assert (tmp_path / "out" / "exclude.txt").read_text() == "# nearly the same as good0.png\nagain.png\n"
    page = open_page(tmp_path / "out" / "flagged.html", accept_downloads=True)
    assert page.locator("#count").text_content() == "4 of 9 images are flagged, 1 are left out"
    pressed = {item.locator(".name").text_content(): item.get_attribute("aria-pressed") for item in
               page.locator(".item").all()}  # fmt: skip
    assert pressed == {"again.png": "true", "good0.png": "false", "framed.png": "false", "blurred.png": "false"}
    page.get_by_role("button", name="blurred.png").click()
    page.get_by_role("button", name="again.png").click()
    page = open_again(page)
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "exclude.txt"
    download.value.save_as(file)
    assert file.read_text().split("\n")[1:] == ["blurred.png", ""]
    page.locator("#kinds select").select_option(label="A frame or bars")
    assert page.locator(".item").count() == 1


def test_a_page_has_room_for_so_many(root: Path, tmp_path: Path, monkeypatch, capsys, open_page) -> None:
    monkeypatch.setattr(summary, "MOST_THUMBNAILS", 3)
    check(root, tmp_path / "out", monkeypatch, capsys)
    page = open_page(tmp_path / "out" / "flagged.html")
    told = "3 of 9 images are flagged, 1 are left out, 1 more are flagged and not shown here"
    assert page.locator("#count").text_content() == told
    assert page.locator(".item").count() == 3


def test_named_images_are_left_out(root: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    file = tmp_path / "exclude.txt"
    file.write_text("# a comment\nblurred.png\r\n\nagain.png\n")
    told = check(root, tmp_path / "out", monkeypatch, capsys, f"data.exclude={file}")
    assert "images           7, and 0 that cannot be read" in told
    assert "near-duplicates  none" in told
    source = Folder(str(root), "all")
    data = Images(source, source, 2, 64, exclude=str(file))
    assert "blurred.png" not in set(data.train_set.source.keys)
    (mixed,) = without([Mix({"a": source}, repeats={"a": 2})], str(file), whole=False)
    assert len(mixed.keys) == 18, "keys of a mix begin with the name of their source"
    file.write_text("a/again.png\n")
    (mixed,) = without([Mix({"a": source}, repeats={"a": 2})], str(file))
    assert len(mixed.keys) == 16


def test_names_that_are_not_there_are_told(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "exclude.txt"
    file.write_text("blured.png\n")
    with pytest.raises(
        UserError, match=r"data\.exclude=.*: names images that are not here: blured\.png; did you mean 'bl"
    ):
        without([Folder(str(root), "all")], str(file))
    with pytest.raises(UserError, match=r"data\.exclude=.*gone.*: cannot be read"):
        without([Folder(str(root), "all")], str(tmp_path / "gone"))
    file.write_text("\n".join(Folder(str(root), "all").keys))
    with pytest.raises(UserError, match="leaves no image to train on"):
        without([Folder(str(root), "all")], str(file))


def test_names_that_begin_like_comments_are_names_where_they_are(root: Path, tmp_path: Path) -> None:
    (root / "again.png").rename(root / "#1.png")
    (tmp_path / "exclude.txt").write_text("# a comment\n#1.png\n")
    (left,) = without([Folder(str(root), "all", default_caption="x")], str(tmp_path / "exclude.txt"))
    assert "#1.png" not in set(left.keys)
    assert len(left.keys) == 8
