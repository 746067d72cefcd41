"""Scenes: what a toy picture shows and the caption that says so; what can be told from what, and where things fit.

Knows sampling and the splits. Must not know looks, colours as numbers, shapes or pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sdft.data.toy.lexicon import Kind

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

    pose: what the subject does. worn: `hat`, `scarf` or `crown`. finish: a material or a pattern. relation: how the
    subject stands to the other one.
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

    @property
    def subjects(self) -> tuple[str, ...]:
        """What the scene shows: one subject or two."""
        return (self.subject,) if self.other is None else (self.subject, self.other.subject)

    @property
    def named(self) -> str:
        """Its subjects as a caption names them: `cat`, or `cat and a car`."""
        return " and a ".join(self.subjects)


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


def says_place(rng: np.random.Generator, kind: Kind, subject: str, place: str, time_said: bool) -> bool:
    """Whether the caption says where the subject is."""
    if place == kind.home:
        return subject not in WIDE_SUBJECTS and rng.random() < 0.2
    if time_said and place == kind.places[0]:
        return rng.random() < 0.6
    return True
