"""Texts of any language in pictures: no boxes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from sdft.evaluation.image_grid import grid
from sdft.pages import lettering
from sdft.pages.lettering import FONTS, NOTHING, Lettering, drawable, has


@pytest.fixture(autouse=True)
def _no_fonts_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lettering, "found_fonts", lambda letter: [])
    drawable.cache_clear()


TEXTS = ["Рыжий кот", "赤い猫が", "빨간 고양이", "חתול אדום", "قطة حمراء", "à la crème", "żół", "🐈😀🏰🤖", "λόγος"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_fonts_that_ship_have_them(text: str) -> None:
    for letter in text:
        file, drawn = drawable(letter, 13)
        assert drawn == letter
        assert has(file, letter, 13)


def test_what_no_font_has_is_named() -> None:
    text = Lettering(13)
    drawn = lambda words: "".join(part for _, part in text._runs(words))  # noqa: E731
    assert drawn("a 🫠 here") == "a [melting face] here"
    assert drawn("ไฟล์ one") == "[thai] one"
    assert drawn("हिन्दी") == "[devanagari]"
    assert drawn("x\ue000é") == "x[u+e000]é"
    assert drawn("é\u200d\ufe0f!") == "é!", "joiners and selectors are no boxes"


def test_a_font_of_this_machine_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lettering, "FONTS", FONTS[:1])
    monkeypatch.setattr(lettering, "found_fonts", lambda letter: ["/no/such/font.ttf", FONTS[1]])
    drawable.cache_clear()
    assert drawable("猫", 13) == (FONTS[1], "猫")


def test_what_is_drawn_is_no_box() -> None:
    """The pixels are those of the glyph, and not of what fonts show for a character that they do not have."""
    for letter, file in (("ж", FONTS[0]), ("猫", FONTS[1])):
        picture = Image.new("L", (40, 40))
        Lettering(20).draw(ImageDraw.Draw(picture), (5, 30), letter, 255)
        expected, box = Image.new("L", (40, 40)), Image.new("L", (40, 40))
        font = ImageFont.truetype(file, 20)
        ImageDraw.Draw(expected).text((5, 30), letter, 255, font=font, anchor="ls")
        ImageDraw.Draw(box).text((5, 30), NOTHING, 255, font=font, anchor="ls")
        assert np.array_equal(np.asarray(picture), np.asarray(expected))
        assert not np.array_equal(np.asarray(picture), np.asarray(box))


def test_the_width_is_that_of_what_is_drawn() -> None:
    text = Lettering(16)
    for words in ("plain", "кот 猫 cat", "a 🐈 🫠"):
        picture = Image.new("L", (400, 40))
        text.draw(ImageDraw.Draw(picture), (0, 30), words, 255)
        columns = np.flatnonzero(np.asarray(picture).max(0))
        assert columns.max() <= text.getlength(words) <= columns.max() + 4


def test_grids_take_any_language(tmp_path: Path) -> None:
    images = [np.zeros((2, 64, 64, 3), np.uint8)] * 2
    sheet = grid(images, ["кот", "猫"], ["赤い猫がテーブルの上に座っている", "חתול"])
    assert sheet.width > 140
