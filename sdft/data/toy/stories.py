"""Sampled scenes: one or two subjects that do, wear and are made of something, in all weathers, as a pure function of
(seed, index).

Knows sampling and captions. Must not know looks, colours as numbers, shapes or pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdft.data.toy.lexicon import (
    ACTIONS,
    ARTICLES,
    BACKDROPS,
    CARRIERS,
    CLOTHES,
    ENDINGS,
    FILLERS,
    FINISHES,
    FLYERS,
    GROUNDED,
    KINDS,
    MATERIALS,
    MOUNTAIN_PHRASES,
    OWN_KINDS,
    PLACE_PHRASES,
    POSITION_PHRASES,
    PREFIXES,
    RELATIONS,
    RIDERS,
    SHELTERED,
    SHELTERS,
    SINGLE,
    SIZE_WORDS,
    SMALL,
    SUBJECTS,
    TIME_PHRASES,
    WEAR_COLOURS,
    WEAR_PHRASES,
    WEARERS,
    Kind,
)
from sdft.data.toy.scenes import INDOORS, WIDE_SUBJECTS, Other, Scene, allowed_colours, extent, one, pick, says_place

PAIRS = 0.35
"""Default share of scenes with two subjects."""
_RELATIONS = {"on": 0.25, "beside": 0.3, "before": 0.2, "above": 0.13, "under": 0.12}
_TIMES = {"day": 0.4, "sunny": 0.17, "sunset": 0.14, "night": 0.14, "rain": 0.08, "fog": 0.07}


def sample_scene(
    seed: int, index: int, own: str | None = None, name: str | None = None, pairs: float = PAIRS
) -> Scene:
    """The scene with this seed and index; the same arguments always give the same scene.

    own: what it shows instead, one of OWN_KINDS. name: what its caption calls that; its own name if None.
    pairs: share of scenes with two subjects; none has an `own`.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, index, 1]))
    if own is None and rng.random() < pairs:
        return _pair(rng, seed, index)
    subject = one(rng, SUBJECTS) if own is None else own
    kind = KINDS.get(subject) or OWN_KINDS[subject]
    if rng.random() < kind.studio_share - 0.1:
        place = "studio"
    else:
        place = kind.places[0] if rng.random() < 0.4 else one(rng, kind.places)
    time, time_said = _time(rng, place)
    pose = one(rng, ACTIONS[subject]) if subject in ACTIONS and rng.random() < 0.22 else ""
    if pose == "flying" and place not in ("studio", "sky"):
        place = "sky"
        time, time_said = _time(rng, place)
    finish, colour, colour_said = _surface(rng, subject, kind, place, time)
    position, size_word, x, size, y = extent(rng, subject, place)
    worn = one(rng, CLOTHES) if subject in WEARERS and pose in ("", "flying") and rng.random() < 0.25 else ""
    worn_colour = one(rng, WEAR_COLOURS) if worn in ("hat", "scarf") else ""
    place_said = says_place(rng, kind, subject, place, time_said)
    facts: dict[str, Any] = {"position": position, "size_word": size_word, "pose": pose, "worn": worn, "finish": finish}
    said = {"colour": colour_said, "time": time_said, "place": place_said, **facts}
    noun = _noun(rng, name or subject, size_word, finish, colour if colour_said else "")
    clothing = _with_article(f"{worn_colour} {worn}".strip()) if worn else ""
    does = " ".join(part for part in (pose, one(rng, WEAR_PHRASES).format(clothing) if worn else "") if part)
    places = MOUNTAIN_PHRASES if subject == "mountain" else PLACE_PHRASES
    where = [*_phrase(rng, POSITION_PHRASES, position), *_phrase(rng, places, place if place_said else "")]
    caption = _caption(
        rng, f"{noun} {does}".strip(), where + _phrase(rng, TIME_PHRASES, time if time_said else "")
    )
    return Scene(
        seed=seed, index=index, subject=subject, colour=colour, place=place, time=time, x=x, y=y, size=size,
        flip=kind.directed and rng.random() < 0.35, stated=frozenset(name for name, of in said.items() if of),
        caption=caption, worn_colour=worn_colour, **facts, **_variation(rng),
    )  # fmt: skip


def _pair(rng: np.random.Generator, seed: int, index: int) -> Scene:
    relation = pick(rng, _RELATIONS)
    subject, other = _subjects(rng, relation)
    place = _shared_place(rng, relation, subject, other)
    time, time_said = _time(rng, place)
    looks = [_surface(rng, one_of_two, KINDS[one_of_two], place, time) for one_of_two in (subject, other)]
    (finish, colour, said), (other_finish, other_colour, other_said) = looks
    if colour == other_colour and colour and not (said and other_said):  # a colour that is said is said of one of them
        said = other_said = False
    (x, y, size), (other_x, other_y, other_size) = _places(rng, relation, subject, other)
    pose = "flying" if relation == "above" and subject in ("bird", "rocket") else ""
    nouns = [
        _noun(rng, subject, "", finish, colour if said else ""),
        _noun(rng, other, "", other_finish, other_colour if other_said else ""),
    ]
    words = one(rng, RELATIONS[relation])
    if words == "and" and rng.random() < 0.5:
        nouns.reverse()
    place_said = place != "studio" and rng.random() < 0.75
    stated = {"colour": said, "other_colour": other_said, "time": time_said, "place": place_said, "relation": True}
    places = MOUNTAIN_PHRASES if other == "mountain" else PLACE_PHRASES
    where = _phrase(rng, places, place if place_said else "")
    where += _phrase(rng, TIME_PHRASES, time if time_said else "")
    turned = KINDS[other].directed and rng.random() < 0.35
    return Scene(
        seed=seed, index=index, subject=subject, colour=colour, place=place, time=time, x=x, y=y, size=size,
        position="", size_word="", flip=KINDS[subject].directed and rng.random() < 0.35,
        stated=frozenset(name for name, of in stated.items() if of),
        caption=_caption(rng, f"{nouns[0]} {words} {nouns[1]}", where), pose=pose, finish=finish,
        other=Other(other, other_colour, other_finish, other_x, other_y, other_size, turned), relation=relation,
        **_variation(rng),
    )  # fmt: skip


def _variation(rng: np.random.Generator) -> Any:
    """What no caption says."""
    tint = tuple(float(value) for value in rng.uniform(-12.0, 12.0, 3))
    return {"tint": tint, "horizon": float(rng.uniform(0.56, 0.66)), "hue": float(rng.random())}


def _time(rng: np.random.Generator, place: str) -> tuple[str, bool]:
    """The time or the weather, and whether the caption says it."""
    if place in INDOORS:
        candle = place == "table" and rng.random() < 0.15
        return ("candle", True) if candle else ("day", False)
    time = pick(rng, _TIMES)
    return time, time != "day" or rng.random() < 0.12


def _surface(rng: np.random.Generator, subject: str, kind: Kind, place: str, time: str) -> tuple[str, str, bool]:
    """Finish, colour and whether the caption says the colour. A material has a colour of its own."""
    finish = one(rng, FINISHES[subject]) if subject in FINISHES and rng.random() < 0.16 else ""
    if finish in MATERIALS.get(subject, ()):
        return finish, "", False
    if not kind.colours or len(kind.colours) == 1:
        return finish, kind.colours[0] if kind.colours else "", False
    said = rng.random() < 0.62
    return finish, one(rng, allowed_colours(kind, place, time)) if said else kind.colours[0], said


def _subjects(rng: np.random.Generator, relation: str) -> tuple[str, str]:
    if relation == "beside":
        beside = tuple(name for name in SUBJECTS if name not in SINGLE)
        while True:
            first, second = one(rng, beside), one(rng, beside)
            if first != second and _places_of(first) & _places_of(second):
                return first, second
    tables = {
        "on": (RIDERS, CARRIERS),
        "before": (SMALL, BACKDROPS),
        "above": (FLYERS, GROUNDED),
        "under": (SHELTERED, SHELTERS),
    }
    first_of, second_of = tables[relation]
    while True:
        first, second = one(rng, first_of), one(rng, second_of)
        if first != second:
            return first, second


def _places_of(subject: str) -> set[str]:
    return set(KINDS[subject].places) - {"sky", "underwater"}


def _shared_place(rng: np.random.Generator, relation: str, subject: str, other: str) -> str:
    if relation != "before" and other != "boat" and rng.random() < 0.3:
        return "studio"
    if relation == "beside":
        return one(rng, tuple(sorted(_places_of(subject) & _places_of(other))))
    nowhere = {"table", "sea"} if relation == "before" else {"table"}
    return one(rng, tuple(sorted(_places_of(other) - nowhere)))


def _places(
    rng: np.random.Generator, relation: str, subject: str, other: str
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Centre x, vertical anchor and size of both; the anchor of something that another carries is not used."""
    near = rng.uniform(-0.02, 0.02, 4)
    side = 1.0 if rng.random() < 0.5 else -1.0
    base = rng.uniform(0.86, 0.9)
    if relation == "on":
        return (0.5, 0.5, rng.uniform(0.29, 0.34)), (0.5 + near[1], base, rng.uniform(0.48, 0.54))
    if relation == "beside":
        return (0.5 - side * 0.235, base, rng.uniform(0.40, 0.46)), (
            0.5 + side * 0.235,
            base + near[1],
            rng.uniform(0.40, 0.46),
        )
    if relation == "before":
        wide = other in WIDE_SUBJECTS
        big = (0.5 + near[0], 0.70, 0.73) if wide else (0.5 - side * 0.08, 0.79 + near[1], rng.uniform(0.58, 0.64))
        return (0.5 + side * (0.2 if wide else 0.24), 0.94, rng.uniform(0.31, 0.36)), big
    if relation == "above":
        return (0.5 + side * rng.uniform(0.0, 0.2), 0.21 + near[0], rng.uniform(0.27, 0.31)), (
            0.5 + near[1],
            base,
            rng.uniform(0.44, 0.5),
        )
    if other == "tree":
        return (0.5 + side * 0.14, 0.93, rng.uniform(0.28, 0.32)), (0.5, 0.86, rng.uniform(0.7, 0.76))
    return (0.46, base + 0.02, rng.uniform(0.36, 0.40)), (0.56, base - 0.08, rng.uniform(0.64, 0.7))


def _with_article(noun: str) -> str:
    return f"{ARTICLES[noun[0] in 'aeiou']} {noun}"


def _noun(rng: np.random.Generator, name: str, size_word: str, finish: str, colour: str) -> str:
    filler = one(rng, FILLERS) if rng.random() < 0.06 else ""
    size = one(rng, SIZE_WORDS[size_word]) if size_word else ""
    return _with_article(" ".join(word for word in (filler, size, finish, colour, name) if word))


def _phrase(rng: np.random.Generator, phrases: Mapping[str, tuple[str, ...]], fact: str) -> list[str]:
    """One phrase for a fact; none if there is none."""
    return [one(rng, phrases[fact])] if fact in phrases else []


def _caption(rng: np.random.Generator, noun: str, said: list[str]) -> str:
    """The noun phrase and what is said of the scene, in one of the ways in which people write."""
    if len(said) > 1 and rng.random() < 0.3:
        said = said[::-1]
    ending = [one(rng, ENDINGS)] if rng.random() < 0.06 else []
    head = f"{pick(rng, PREFIXES)} {noun}".strip()
    if rng.random() < 0.2:
        return ", ".join([head, *said, *ending])
    return ", ".join([" ".join([head, *said]), *ending])
