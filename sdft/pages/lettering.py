"""Draws texts of any language into pictures.

Pillow's own font has ASCII only. Other texts are drawn with the fonts in `fonts/`, then with fonts of this machine that
fontconfig finds; what no font has is written by its Unicode name, or that of its script: `[melting face]` or `[thai]`.
"""

from __future__ import annotations

import functools
import itertools
import subprocess
import unicodedata
from pathlib import Path

from PIL import ImageDraw, ImageFont

FILES = ("DejaVuSans.ttf", "DroidSansFallback.ttf", "SymbolaEmoji.ttf")
FONTS = tuple(str(Path(__file__).parent / "fonts" / name) for name in FILES)
NOTHING = "\U0010ffff"
"""A character that no font has."""
INVISIBLE = ("Cf", "Cc")
"""Categories of characters without a glyph, such as joiners."""


class Lettering:
    """Texts at one size. Has what Pillow's fonts have of `getlength`.

    size: of the letters, in pixels.
    """

    def __init__(self, size: float):
        self.size = size
        self.plain = ImageFont.load_default(size)

    def getlength(self, text: str) -> float:
        """The width of a text, in pixels."""
        return sum(font.getlength(part) for font, part in self._runs(text))

    def draw(self, draw: ImageDraw.ImageDraw, xy: tuple[float, float], text: str, fill, anchor: str = "ls") -> None:
        """Draw a line of text. anchor: Pillow's; `l` for the left, then the vertical place."""
        x, y = xy
        for font, part in self._runs(text):
            draw.text((x, y), part, fill, font=font, anchor=anchor)
            x += font.getlength(part)

    def _runs(self, text: str) -> list[tuple[ImageFont.FreeTypeFont, str]]:
        """Parts of a text, each with the font that has its letters."""
        if text.isascii():
            return [(self.plain, text)]  # type: ignore[list-item]
        letters = [pair for pair in (drawable(letter, self.size) for letter in text) if pair[1]]
        repeats = {i for i, (a, b) in enumerate(itertools.pairwise(letters), 1) if a == b and len(a[1]) > 1}
        letters = [pair for i, pair in enumerate(letters) if i not in repeats]  # one [thai] for several letters
        groups = itertools.groupby(letters, key=lambda pair: pair[0])
        return [(loaded(file, self.size), "".join(part for _, part in group)) for file, group in groups]


@functools.cache
def drawable(letter: str, size: float) -> tuple[str, str]:
    """(file of a font, what to draw with it) for one character."""
    category = unicodedata.category(letter)
    if category in INVISIBLE:
        return FONTS[0], ""
    for file in itertools.chain(FONTS, found_fonts(letter)):
        if has(file, letter, size):
            return file, letter
    name = unicodedata.name(letter, f"U+{ord(letter):04X}").lower()
    if category.startswith("M"):
        return FONTS[0], ""  # a mark on a letter that no font has either
    return FONTS[0], f"[{name.split()[0] if category.startswith('L') else name}]"


@functools.lru_cache(maxsize=64)
def loaded(file: str, size: float, layout: ImageFont.Layout | None = None) -> ImageFont.FreeTypeFont:
    """A font at a size. Raises OSError for one that has no letters of this size."""
    return ImageFont.truetype(file, size, layout_engine=layout)


def has(file: str, letter: str, size: float) -> bool:
    """Whether a font has a glyph for a character."""
    try:
        # Not Raqm's layout, which adds a circle below a mark.
        font = loaded(file, size, ImageFont.Layout.BASIC)
        drawn = bytes(font.getmask(letter))
        return letter.isspace() or (any(drawn) and drawn != bytes(font.getmask(NOTHING)))
    except OSError:
        return False  # colour fonts have only one size


@functools.cache
def found_fonts(letter: str) -> list[str]:
    """Files of fonts of this machine with a character, if fontconfig is here."""
    try:
        words = ["fc-list", f":charset={ord(letter):x}", "--format", "%{file}\\n"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted(line for line in done.stdout.splitlines() if line.endswith((".ttf", ".otf", ".ttc")))


def broken(word: str, font: Lettering, width: float) -> list[str]:
    """A word split into pieces that are at most `width` pixels wide."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces
