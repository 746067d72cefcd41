"""The words of simple scenes: which subjects, colours, places and phrases exist and which go together.

Knows tables and the vocabulary derived from them. Must not know how anything is drawn or sampled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_WARM = ("red", "orange", "yellow", "pink")
_COOL = ("green", "blue", "purple")
_DULL = ("brown", "white", "black", "grey")
COLOURS: tuple[str, ...] = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "black",
    "grey")


@dataclass(frozen=True)
class Kind:
    """What may be said of a subject: its usual colour first, its usual outdoor place first."""

    colours: tuple[str, ...]
    places: tuple[str, ...]
    home: str = "studio"
    studio_share: float = 0.6
    directed: bool = False


def _colours(usual: str, others: tuple[str, ...]) -> tuple[str, ...]:
    return (usual, *(colour for colour in others if colour != usual))


_ALL = _WARM + _COOL + _DULL
_BRIGHT = _WARM + _COOL
_LAND = ("grass", "snow", "desert")
KINDS: dict[str, Kind] = {
    "cat": Kind(_colours("orange", _ALL), ("grass", "snow", "table"), directed=True),
    "dog": Kind(_colours("brown", _ALL), _LAND, directed=True),
    "laptop": Kind(_colours("grey", (*_BRIGHT, "white", "black")), ("table",), studio_share=0.4),
    "fairy tale forest": Kind((), ("grass", "snow"), home="grass", studio_share=0.0),
    "castle": Kind(_colours("grey", (*_BRIGHT, "white", "brown")), _LAND),
    "car": Kind(_colours("red", _ALL), ("road", "grass", "snow", "desert"), directed=True),
    "bird": Kind(_colours("blue", _ALL), ("grass", "sky", "snow"), directed=True),
    "mushroom": Kind(_colours("red", (*_BRIGHT, "brown", "white")), ("grass", "snow")),
    "robot": Kind(_colours("grey", _ALL), (*_LAND, "road")),
    "house": Kind(_colours("white", (*_BRIGHT, "brown", "grey")), _LAND, directed=True),
    "flower": Kind(_colours("pink", (*_BRIGHT, "white")), ("grass", "snow", "desert")),
    "fish": Kind(_colours("orange", _ALL), ("underwater",), directed=True),
    "boat": Kind(_colours("brown", _ALL), ("sea",), directed=True),
    "tree": Kind(_colours("green", (*_BRIGHT, "brown")), _LAND),
    "hot air balloon": Kind(_colours("red", (*_BRIGHT, "white")), ("sky",)),
    "star": Kind(_colours("yellow", (*_BRIGHT, "white")), ("sky",)),
    "cup": Kind(_colours("blue", _ALL), ("table",), studio_share=0.5, directed=True),
    "mountain": Kind((), ("grass", "snow", "desert", "sea"), home="grass", studio_share=0.0),
    "rocket": Kind(_colours("white", _ALL), ("sky", "desert")),
    "guitar": Kind(_colours("brown", (*_BRIGHT, "white", "black")), ("grass", "table")),
    "lamp": Kind(_colours("yellow", (*_BRIGHT, "white")), ("table",), studio_share=0.5),
    "butterfly": Kind(_colours("purple", (*_BRIGHT, "white")), ("sky",)),
    "cake": Kind(_colours("pink", (*_BRIGHT, "white", "brown")), ("table",), studio_share=0.5),
}
SUBJECTS: tuple[str, ...] = tuple(KINDS)
OWN_KINDS: dict[str, Kind] = {
    "sneaker": Kind(("red",), ("grass", "snow", "table", "road", "desert"), studio_share=0.4, directed=True),
    "wizard": Kind(("purple",), (*_LAND, "road"), studio_share=0.4),
}
"""One product and one character that nano has never seen and has no words for: what is theirs is never said."""

PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "studio": ("on a plain background", "on a simple background"),
    "grass": ("on the grass", "on green grass"),
    "table": ("on a table", "on a table", "on a wooden table"),
    "sea": ("on the sea", "on the water"),
    "underwater": ("in the sea", "under water"),
    "snow": ("in the snow", "in the white snow"),
    "sky": ("in the sky", "up in the sky"),
    "desert": ("in the desert", "on the sand"),
    "road": ("on a road", "on the road"),
}
MOUNTAIN_PHRASES: dict[str, tuple[str, ...]] = {"sea": ("by the sea",), "snow": ("in the snow",),
    "desert": ("in the desert",)}
TIME_PHRASES: dict[str, tuple[str, ...]] = {
    "day": ("during the day", "by day"),
    "sunny": ("on a sunny day", "in the sun"),
    "sunset": ("at sunset", "in the evening"),
    "night": ("at night", "under the moon"),
}
POSITION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "centre": ("in the centre", "in the middle"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {"small": ("small", "little"), "big": ("big", "large")}
ARTICLES: tuple[str, ...] = ("a", "an")
TEMPLATES: tuple[tuple[str, float], ...] = (
    ("{noun} {position} {place} {time}", 0.48),
    ("{noun} {place} {position} {time}", 0.14),
    ("{time} {noun} {position} {place}", 0.06),
    ("a picture of {noun} {position} {place} {time}", 0.12),
    ("picture of {noun} {place} {position} {time}", 0.04),
    ("a photo of {noun} {position} {place} {time}", 0.08),
    ("photo of {noun} {position} {place} {time}", 0.04),
    ("there is {noun} {position} {place} {time}", 0.04),
)


def _every_phrase() -> list[str]:
    tables = (PLACE_PHRASES, MOUNTAIN_PHRASES, TIME_PHRASES, POSITION_PHRASES, SIZE_WORDS)
    phrases = [phrase for table in tables for options in table.values() for phrase in options]
    bare = [re.sub(r"\{\w+\}", " ", template) for template, _ in TEMPLATES]
    return [*phrases, *bare, *SUBJECTS, *COLOURS, *ARTICLES]


VOCABULARY: tuple[str, ...] = tuple(sorted({word for phrase in _every_phrase() for word in phrase.split()}))
