"""Which pictures of a source are learned and which are kept back to judge the result: chosen by name alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sdft.data.dataset import Sample, Source
from sdft.data.decode import Encoded
from sdft.rng import seed_of

Split = Literal["all", "train", "validation"]


def held_out_keys(keys: Sequence[str], share: float) -> set[str]:
    """About `share` of the keys, at least one and not all: those that hash below it, so that adding some moves none."""
    place = {key: seed_of(0, "held out", key) / 2**63 for key in keys}
    ranked = sorted(keys, key=place.__getitem__)
    chosen = [key for key in ranked if place[key] < share] or ranked[:1]
    return set(chosen[: len(keys) - 1])


def places_of(keys: Sequence[str], split: Split, share: float) -> list[int]:
    """The positions of the keys of a split."""
    if split == "all":
        return list(range(len(keys)))
    chosen = held_out_keys(keys, share)
    return [place for place, key in enumerate(keys) if (key in chosen) == (split == "validation")]


class Part:
    """Some of the samples of a source, by position."""

    def __init__(self, source: Source, places: Sequence[int]):
        self.source, self.places = source, places
        self.keys = [source.keys[place] for place in places]

    def __getitem__(self, index: int) -> Sample:
        return self.source[self.places[index]]

    def encoded(self, index: int) -> Encoded | None:
        return encoded(self.source, self.places[index])


def encoded(source: Source, index: int) -> Encoded | None:
    """The stored picture of a sample; None where the source draws its pictures."""
    return source.encoded(index) if hasattr(source, "encoded") else None
