"""The page of captions in a real browser: edited, filtered, exported, and taken; hostile text stays text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sdft.captioning.caption_files import CaptionFiles
from sdft.captioning.page.write import write_page

HOSTILE = '</script><img src=x onerror=alert(1)> ${x} `y` & "z" חתול'


@pytest.fixture
def page(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    root.mkdir()
    captions = {"a": "red cat, hat", "b": "red dog, hat", "c": "", "<b>d": HOSTILE}
    for i, (name, text) in enumerate(captions.items()):
        Image.new("RGB", (300 + i, 200), (60 * i, 80, 90)).save(root / f"{name}.png")
        (root / f"{name}.txt").write_text(text)
    files = CaptionFiles(root)
    files.write({files.keys.index("c.png"): "a picture of a cup"}, "judge")
    assert write_page(tmp_path / "out" / "captions.html", CaptionFiles(root)) == 4
    return tmp_path / "out" / "captions.html"


def cards(opened) -> list[str]:
    return [card.input_value() for card in opened.locator(".card textarea").all()]


def test_captions_are_corrected_and_taken(page: Path, tmp_path: Path, open_page, open_again) -> None:
    opened = open_page(page, accept_downloads=True)
    assert cards(opened) == [HOSTILE, "red cat, hat", "red dog, hat", "a picture of a cup"]
    assert opened.locator(".name").first.text_content() == "<b>d.png"
    assert opened.locator("#export").is_disabled()
    # Replace in all shown, among those that a search finds.
    opened.fill("#find", "dog")
    assert cards(opened) == ["red dog, hat"]
    opened.fill("#old", "red")
    opened.fill("#new", "$& blue")
    opened.click("#replace")
    assert cards(opened) == ["$& blue dog, hat"]
    opened.fill("#find", "")
    # One by hand, one by hand and taken back.
    opened.locator("textarea").nth(0).fill("a <i>cat</i>\nof mine")
    opened.locator("textarea").nth(1).fill("something else")
    opened.locator(".card").nth(1).get_by_role("button").click()
    assert cards(opened)[1] == "red cat, hat"
    assert "2 changed" in opened.locator("#count").text_content()
    # What was written is there when the page is opened again.
    opened = open_again(opened)
    assert cards(opened)[0] == "a <i>cat</i>\nof mine"
    with opened.expect_download() as download:
        opened.click("#export")
    file = tmp_path / "corrections.json"
    download.value.save_as(file)
    content = json.loads(file.read_text())["captions"]
    assert content == {
        "<b>d.png": {"before": HOSTILE, "text": "a <i>cat</i>\nof mine"},
        "b.png": {"before": "red dog, hat", "text": "$& blue dog, hat"},
    }
    files = CaptionFiles(tmp_path / "pictures")
    files.write(files.corrections(file), "a person")
    assert (tmp_path / "pictures" / "<b>d.txt").read_text() == "a <i>cat</i> of mine\n"


def test_the_filters(page: Path, open_page) -> None:
    opened = open_page(page)
    select = opened.locator("#kinds select")
    select.select_option(label="Made by a model")
    assert cards(opened) == ["a picture of a cup"]
    assert opened.locator(".foot span").text_content() == "made by judge"
    select.select_option(label="Written by a person")
    assert len(cards(opened)) == 3
    opened.locator("textarea").nth(1).fill(" ")
    select.select_option(label="Without caption")
    assert cards(opened) == [" "]
    opened.click("#export")
    assert "1 captions are empty, such as that of a.png" in opened.locator("#count").text_content()
    select.select_option(label="All images")
    opened.locator("textarea").nth(1).fill("red dog, hat")
    select.select_option(label="Same caption as another")
    assert cards(opened) == ["red dog, hat", "red dog, hat"]
    select.select_option(label="All images")
    opened.get_by_role("button", name="hat 2").click()
    assert opened.input_value("#find") == "hat"
    assert len(cards(opened)) == 2


def test_on_a_phone_it_fits(page: Path, open_page) -> None:
    opened = open_page(page, viewport={"width": 390, "height": 844}, color_scheme="dark")
    assert opened.evaluate("document.documentElement.scrollWidth") == 390
    assert opened.locator(".card img").first.evaluate("image => image.naturalWidth") > 0
