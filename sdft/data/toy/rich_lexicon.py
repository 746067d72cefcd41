"""The words of rich scenes: more subjects, what they do and wear and are made of, pairs of them, weather.

Knows tables and the vocabulary derived from them. Must not know how anything is drawn or sampled.
"""

from __future__ import annotations

from sdft.data.toy.lexicon import (
    ARTICLES,
    COLOURS,
    KINDS,
    MOUNTAIN_PHRASES,
    PLACE_PHRASES,
    POSITION_PHRASES,
    SIZE_WORDS,
    TIME_PHRASES,
    Kind,
)

_BRIGHT = ("red", "orange", "yellow", "pink", "green", "blue", "purple")
_LAND = ("grass", "snow", "desert")


def _kind(usual: str, others: tuple[str, ...], places: tuple[str, ...], **settings: float) -> Kind:
    colours = (usual, *(colour for colour in others if colour != usual))
    return Kind(colours, places, **settings)  # type: ignore[arg-type]


RICH_KINDS: dict[str, Kind] = KINDS | {
    "rabbit": _kind("white", COLOURS, ("grass", "snow", "desert")),
    "owl": _kind("brown", COLOURS, ("grass", "snow", "sky")),
    "horse": _kind("brown", COLOURS, (*_LAND, "road"), directed=True),
    "train": _kind("black", (*_BRIGHT, "grey"), ("grass", "desert", "snow"), directed=True),
    "bicycle": _kind("blue", (*_BRIGHT, "white"), ("road", "grass"), directed=True),
    "umbrella": _kind("red", (*_BRIGHT, "white", "black"), ("grass", "desert", "road")),
    "chair": _kind("brown", (*_BRIGHT, "white", "grey"), ("grass", "snow"), directed=True),
}
RICH_SUBJECTS: tuple[str, ...] = tuple(RICH_KINDS)

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
    for name in RICH_SUBJECTS
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

RICH_PLACE_PHRASES: dict[str, tuple[str, ...]] = PLACE_PHRASES | {
    "grass": ("on the grass", "on green grass", "in a meadow"),
    "snow": ("in the snow", "in the white snow", "in winter"),
    "road": ("on a road", "on the road", "on the street"),
    "sea": ("on the sea", "on the water", "on the waves"),
}
RICH_TIME_PHRASES: dict[str, tuple[str, ...]] = TIME_PHRASES | {
    "rain": ("in the rain", "on a rainy day"),
    "fog": ("in the fog", "on a foggy day"),
    "candle": ("by candlelight", "in warm light"),
}
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
        RICH_PLACE_PHRASES,
        MOUNTAIN_PHRASES,
        RICH_TIME_PHRASES,
        POSITION_PHRASES,
        SIZE_WORDS,
        RELATIONS,
        ACTIONS,
        FINISHES,
    )
    phrases = [phrase for table in tables for options in table.values() for phrase in options]
    bare = [phrase.replace("{}", " ") for phrase in WEAR_PHRASES]
    return [*phrases, *bare, *CLOTHES, *PREFIXES, *FILLERS, *ENDINGS, *RICH_SUBJECTS, *COLOURS, *ARTICLES, ","]


RICH_VOCABULARY: tuple[str, ...] = tuple(sorted({word for phrase in _every_phrase() for word in phrase.split()}))
