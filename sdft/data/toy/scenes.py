"""Scenes: what a toy picture shows and the caption that says so, as a pure function of (seed, index).

Knows sampling, captions and the splits. Must not know looks, colours as numbers, shapes or pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sdft.data.toy.lexicon import (
    ARTICLES,
    KINDS,
    MOUNTAIN_PHRASES,
    OWN_KINDS,
    PLACE_PHRASES,
    POSITION_PHRASES,
    SIZE_WORDS,
    SUBJECTS,
    TEMPLATES,
    TIME_PHRASES,
    VOCABULARY,
    Kind,
)

__all__ = ["OWN_KINDS", "SPLITS", "SUBJECTS", "VOCABULARY", "Scene", "sample_scene", "split_index"]

SPLITS: tuple[str, ...] = ("train", "validation", "test")
WIDE_SUBJECTS = frozenset({"fairy tale forest", "mountain"})
INDOORS = frozenset({"studio", "table", "underwater"})
_CLASHES: dict[str, frozenset[str]] = {
    "grass": frozenset({"green"}),
    "snow": frozenset({"white"}),
    "desert": frozenset({"yellow"}),
    "table": frozenset({"brown"}),
    "underwater": frozenset({"blue"}),
    "road": frozenset({"grey"}),
    "night": frozenset({"black"}),
}


@dataclass(frozen=True)
class Other:
    """The second subject of a scene."""

    subject: str
    colour: str
    finish: str
    x: float
    y: float
    size: float
    flip: bool


@dataclass(frozen=True)
class Scene:
    """What all looks share: what is shown, where, how big, and the caption; `stated` lists what the caption says.

    What follows `caption` only rich scenes have. pose: what the subject does. worn: `hat`, `scarf` or `crown`. finish:
    a material or a pattern. relation: how the subject stands to the other one. rich: drawn with details.
    """

    seed: int
    index: int
    subject: str
    colour: str
    place: str
    time: str
    position: str
    size_word: str
    x: float
    y: float
    size: float
    horizon: float
    flip: bool
    tint: tuple[float, float, float]
    hue: float
    stated: frozenset[str]
    caption: str
    pose: str = ""
    worn: str = ""
    worn_colour: str = ""
    finish: str = ""
    other: Other | None = None
    relation: str = ""
    rich: bool = False

    @property
    def named(self) -> str:
        """What the scene shows: `cat`, or `cat and a car`."""
        return self.subject if self.other is None else f"{self.subject} and a {self.other.subject}"


def split_index(split: str, i: int) -> int:
    """The scene index of the i-th scene of a split; splits never share an index."""
    if i < 0:
        raise ValueError(f"scene number must not be negative: {i}")
    return i * len(SPLITS) + SPLITS.index(split)


def pick(rng: np.random.Generator, options: dict[str, float]) -> str:
    """One of the names, by their weights."""
    names = list(options)
    weights = np.array([options[name] for name in names])
    return names[int(rng.choice(len(names), p=weights / weights.sum()))]


def one(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    """One of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def allowed_colours(kind: Kind, place: str, time: str) -> tuple[str, ...]:
    """The colours of a subject that can be told from what is behind it."""
    clashes = _CLASHES.get(place, frozenset()) | _CLASHES.get(time, frozenset())
    return tuple(colour for colour in kind.colours if colour not in clashes)


def _colour(rng: np.random.Generator, kind: Kind, place: str, time: str) -> tuple[str, bool]:
    if not kind.colours:
        return "", False
    usual = kind.colours[0]
    if len(kind.colours) == 1:
        return usual, False
    stated = rng.random() < 0.62
    colour = one(rng, allowed_colours(kind, place, time)) if stated else usual
    return colour, stated


def extent(rng: np.random.Generator, subject: str, place: str) -> tuple[str, str, float, float, float]:
    """Position word, size word, centre x, size and vertical anchor (base of the subject on land, centre elsewhere)."""
    if subject in WIDE_SUBJECTS:
        return "", "", 0.5 + rng.uniform(-0.04, 0.04), rng.uniform(0.68, 0.78), rng.uniform(0.68, 0.72)
    position = pick(rng, {"": 0.74, "left": 0.1, "right": 0.1, "centre": 0.06})
    sided = position in ("left", "right")
    size_word = pick(rng, {"": 0.82, "small": 0.09, "big": 0.0 if sided else 0.09})
    low, high = {"": (0.58, 0.70), "small": (0.34, 0.41), "big": (0.80, 0.86)}[size_word]
    if sided and not size_word:
        low, high = 0.44, 0.52
    offset = rng.uniform(-0.03, 0.03)
    x = {"left": 0.30, "right": 0.70}.get(position, 0.5) + offset
    free = place in ("studio", "sky", "underwater")
    base = rng.uniform(0.46, 0.54) if free else rng.uniform(0.84, 0.90) + (0.04 if size_word == "big" else 0.0)
    return position, size_word, x, rng.uniform(low, high), base


def _caption(rng: np.random.Generator, facts: dict[str, str], stated: set[str]) -> str:
    words = [facts["colour"]] if "colour" in stated else []
    if facts["size_word"]:
        words.insert(0, one(rng, SIZE_WORDS[facts["size_word"]]))
    words.append(facts["subject"])
    noun = f"{ARTICLES[words[0][0] in 'aeiou']} {' '.join(words)}"
    place_table = MOUNTAIN_PHRASES if facts["subject"] == "mountain" else PLACE_PHRASES
    place = one(rng, place_table[facts["place"]]) if "place" in stated else ""
    time = one(rng, TIME_PHRASES[facts["time"]]) if "time" in stated else ""
    position = one(rng, POSITION_PHRASES[facts["position"]]) if facts["position"] else ""
    template = pick(rng, dict(TEMPLATES))
    return " ".join(template.format(noun=noun, place=place, time=time, position=position).split())


def says_place(rng: np.random.Generator, kind: Kind, subject: str, place: str, time_said: bool) -> bool:
    """Whether the caption says where the subject is."""
    if place == kind.home:
        return subject not in WIDE_SUBJECTS and rng.random() < 0.2
    if time_said and place == kind.places[0]:
        return rng.random() < 0.6
    return True


def sample_scene(seed: int, index: int, own: str | None = None, name: str | None = None) -> Scene:
    """The scene with this seed and index; the same arguments always give the same scene.

    own: what it shows instead, one of OWN_KINDS. name: what its caption calls that; its own name if None.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    subject = one(rng, SUBJECTS)
    if own is not None:
        subject = own
    kind = KINDS.get(subject) or OWN_KINDS[subject]
    if rng.random() < kind.studio_share:
        place = "studio"
    else:
        place = kind.places[0] if rng.random() < 0.4 else one(rng, kind.places)
    time = "day" if place in INDOORS else pick(rng, {"day": 0.48, "sunny": 0.2, "sunset": 0.14, "night": 0.18})
    time_said = place not in INDOORS and (time != "day" or rng.random() < 0.12)
    colour, colour_said = _colour(rng, kind, place, time)
    position, size_word, x, size, y = extent(rng, subject, place)
    stated = {name for name, said in (
        ("colour", colour_said), ("time", time_said), ("position", bool(position)), ("size_word", bool(size_word)),
        ("place", says_place(rng, kind, subject, place, time_said))) if said}
    facts: dict[str, Any] = {"subject": subject, "colour": colour, "place": place, "time": time, "position": position,
             "size_word": size_word}
    caption = _caption(rng, facts | ({"subject": name} if name else {}), stated)
    red, green, blue = rng.uniform(-12.0, 12.0, 3)
    return Scene(
        seed=seed, index=index, **facts, x=float(x), y=float(y), size=float(size),
        horizon=float(rng.uniform(0.56, 0.66)), flip=bool(kind.directed and rng.random() < 0.35),
        tint=(float(red), float(green), float(blue)), hue=float(rng.random()), stated=frozenset(stated),
        caption=caption,
    )
