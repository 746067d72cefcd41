"""The words of scenes: which subjects, colours, places and phrases exist and which go together, what subjects do,
wear and are made of.

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
    "rabbit": Kind(_colours("white", _ALL), ("grass", "snow", "desert")),
    "owl": Kind(_colours("brown", _ALL), ("grass", "snow", "sky")),
    "horse": Kind(_colours("brown", _ALL), (*_LAND, "road"), directed=True),
    "train": Kind(_colours("black", (*_BRIGHT, "grey")), ("grass", "desert", "snow"), directed=True),
    "bicycle": Kind(_colours("blue", (*_BRIGHT, "white")), ("road", "grass"), directed=True),
    "umbrella": Kind(_colours("red", (*_BRIGHT, "white", "black")), ("grass", "desert", "road")),
    "chair": Kind(_colours("brown", (*_BRIGHT, "white", "grey")), ("grass", "snow"), directed=True),
}
SUBJECTS: tuple[str, ...] = tuple(KINDS)
_AFTER_AN = re.compile(rf"\ba ({'|'.join(name for name in SUBJECTS if name[0] in 'aeiou')})\b")


def with_right_articles(text: str) -> str:
    """`a picture of an owl` for `a picture of a owl`, as a template for any subject gives."""
    return _AFTER_AN.sub(r"an \1", text)


OWN_KINDS: dict[str, Kind] = {
    "sneaker": Kind(("red",), ("grass", "snow", "table", "road", "desert"), studio_share=0.4, directed=True),
    "wizard": Kind(("purple",), (*_LAND, "road"), studio_share=0.4),
}
"""One product and one character that nano has never seen and has no words for: what is theirs is never said."""

PLACE_PHRASES: dict[str, tuple[str, ...]] = {
    "studio": ("on a plain background", "on a simple background"),
    "grass": ("on the grass", "on green grass", "in a meadow"),
    "table": ("on a table", "on a table", "on a wooden table"),
    "sea": ("on the sea", "on the water", "on the waves"),
    "underwater": ("in the sea", "under water"),
    "snow": ("in the snow", "in the white snow", "in winter"),
    "sky": ("in the sky", "up in the sky"),
    "desert": ("in the desert", "on the sand"),
    "road": ("on a road", "on the road", "on the street"),
}
MOUNTAIN_PHRASES: dict[str, tuple[str, ...]] = {"sea": ("by the sea",), "snow": ("in the snow",),
    "desert": ("in the desert",)}
TIME_PHRASES: dict[str, tuple[str, ...]] = {
    "day": ("during the day", "by day"),
    "sunny": ("on a sunny day", "in the sun"),
    "sunset": ("at sunset", "in the evening"),
    "night": ("at night", "under the moon"),
    "rain": ("in the rain", "on a rainy day"),
    "fog": ("in the fog", "on a foggy day"),
    "candle": ("by candlelight", "in warm light"),
}
POSITION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "centre": ("in the centre", "in the middle"),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {"small": ("small", "little"), "big": ("big", "large")}
ARTICLES: tuple[str, ...] = ("a", "an")
ANIMALS: tuple[str, ...] = ("cat", "dog", "rabbit", "owl", "horse", "bird")
ACTIONS: dict[str, tuple[str, ...]] = {
    "cat": ("sleeping",),
    "dog": ("running", "jumping"),
    "horse": ("running",),
    "rabbit": ("jumping",),
    "bird": ("flying",),
    "rocket": ("flying",),
}
"""What a subject may do; sitting or standing is not said."""
WEARERS: tuple[str, ...] = (*ANIMALS, "robot")
CLOTHES: tuple[str, ...] = ("hat", "scarf", "crown")
WEAR_COLOURS: tuple[str, ...] = ("red", "green", "blue", "yellow", "purple", "black")
WEAR_PHRASES: tuple[str, ...] = ("with {}", "wearing {}", "in {}")
MATERIALS: dict[str, tuple[str, ...]] = {
    name: ("wooden", "golden", "stone")
    for name in ("car", "house", "castle", "cup", "boat", "train", "star", "robot", "rocket")
} | {"guitar": ("golden",), "lamp": ("golden", "wooden"), "fish": ("golden",), "laptop": ("wooden", "golden")}
PATTERNS: dict[str, tuple[str, ...]] = {
    name: ("striped", "spotted")
    for name in (
        "cat",
        "dog",
        "rabbit",
        "horse",
        "fish",
        "cup",
        "umbrella",
        "hot air balloon",
        "butterfly",
        "cake",
        "bird",
    )
}
FINISHES: dict[str, tuple[str, ...]] = {
    name: MATERIALS.get(name, ()) + PATTERNS.get(name, ())
    for name in SUBJECTS
    if name in MATERIALS or name in PATTERNS
}
"""What is said before the subject: materials have a colour of their own, patterns go with any."""

RELATIONS: dict[str, tuple[str, ...]] = {
    "on": ("on", "sitting on", "on top of"),
    "beside": ("and", "next to", "beside"),
    "before": ("in front of",),
    "above": ("above", "over"),
    "under": ("under",),
}
RIDERS: tuple[str, ...] = ("cat", "bird", "owl", "rabbit", "butterfly", "robot")
CARRIERS: tuple[str, ...] = ("car", "chair", "mushroom", "train", "horse")
BACKDROPS: tuple[str, ...] = ("house", "castle", "tree", "mountain", "fairy tale forest")
SMALL: tuple[str, ...] = (*ANIMALS, "robot", "mushroom", "flower", "bicycle", "car", "chair", "umbrella")
FLYERS: tuple[str, ...] = ("bird", "butterfly", "hot air balloon", "rocket", "star")
GROUNDED: tuple[str, ...] = ("house", "castle", "tree", "boat", "car", "flower", "train", "dog", "cat", "horse")
SHELTERED: tuple[str, ...] = ("cat", "dog", "rabbit", "robot")
SHELTERS: tuple[str, ...] = ("umbrella", "tree")
SINGLE: tuple[str, ...] = ("fairy tale forest", "mountain", "fish", "hot air balloon", "star", "rocket", "butterfly")
"""Subjects that do not stand beside another."""

PREFIXES: dict[str, float] = {
    "": 0.58,
    "a picture of": 0.14,
    "picture of": 0.04,
    "a photo of": 0.09,
    "photo of": 0.04,
    "there is": 0.04,
    "an image of": 0.04,
    "a view of": 0.03,
}
FILLERS: tuple[str, ...] = ("cute", "beautiful", "nice", "lovely")
"""Words that people write and that change nothing."""
ENDINGS: tuple[str, ...] = ("detailed", "high quality", "centered")


def _every_phrase() -> list[str]:
    tables = (
        PLACE_PHRASES,
        MOUNTAIN_PHRASES,
        TIME_PHRASES,
        POSITION_PHRASES,
        SIZE_WORDS,
        RELATIONS,
        ACTIONS,
        FINISHES,
    )
    phrases = [phrase for table in tables for options in table.values() for phrase in options]
    bare = [phrase.replace("{}", " ") for phrase in WEAR_PHRASES]
    return [*phrases, *bare, *CLOTHES, *PREFIXES, *FILLERS, *ENDINGS, *SUBJECTS, *COLOURS, *ARTICLES, ","]


VOCABULARY: tuple[str, ...] = tuple(sorted({word for phrase in _every_phrase() for word in phrase.split()}))
