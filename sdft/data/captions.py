"""The captions of one sample, and how a visit draws one of them.

Pure text: knows neither tokenizers nor files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

import torch

from sdft.errors import UserError
from sdft.rng import Draws, generator
from sdft.types import Fraction, Index


class Tags:
    """Augmentation of captions that are lists of tags, at each visit.

    shuffle: whether the order of the tags is random.
    keep_first: number of tags at the start that are neither moved nor dropped.
    drop: probability of dropping each of the other tags; at least one tag always remains.
    separator: between tags.
    """

    def __init__(self, shuffle: bool = False, keep_first: Index = 0, drop: Fraction = 0.0, separator: str = ","):
        if not separator.strip():
            raise UserError(f"data.tags.separator={separator!r}: must be more than white space, such as ','")
        if keep_first and not shuffle and not drop:
            raise UserError(f"data.tags.keep_first={keep_first} has no effect without data.tags.shuffle or .drop")
        self.shuffle, self.keep_first, self.drop, self.separator = shuffle, keep_first, drop, separator

    @property
    def vary(self) -> bool:
        """Whether visits can differ."""
        return self.shuffle or self.drop > 0

    def __call__(self, text: str, draws: Draws) -> str:
        """The tags of `text` at the visit of `draws`."""
        tags = [tag.strip() for tag in text.split(self.separator) if tag.strip()]
        kept, rest = tags[: self.keep_first], tags[self.keep_first :]
        if self.drop and rest:
            place = torch.rand(len(rest), generator=stream(draws, "tag drop"), dtype=torch.float64)
            staying = [tag for tag, u in zip(rest, place.tolist(), strict=True) if u >= self.drop]
            rest = staying or ([] if kept else [rest[int(place.argmax())]])
        if self.shuffle:
            order = torch.randperm(len(rest), generator=stream(draws, "tag order")).tolist()
            rest = [rest[i] for i in order]
        return f"{self.separator} ".join([*kept, *rest])


@dataclass(frozen=True)
class Captions:
    """All captions of one sample.

    texts: each visit draws one.
    weights: their relative probabilities; uniform if empty.
    template: format string of the final caption, such as `{caption}, dreamy`.
    tags: augmentation of texts that are lists of tags, if any.
    """

    texts: tuple[str, ...]
    weights: tuple[float, ...] = ()
    template: str = "{caption}"
    tags: Tags | None = None

    @property
    def plain(self) -> str:
        """The first text without augmentation, for validation."""
        return self.template.format(caption=self.texts[0])

    def draw(self, draws: Draws) -> str:
        """The caption of the visit of `draws`."""
        text = self.texts[0]
        if len(self.texts) > 1:
            weights = torch.tensor(self.weights or [1.0] * len(self.texts), dtype=torch.float64)
            chance = weights.cumsum(0) / weights.sum()
            place = int((chance <= draws.uniform("caption choice")).sum())
            text = self.texts[min(place, len(self.texts) - 1)]
        if self.tags is not None and self.tags.vary:
            text = self.tags(text, draws)
        return self.template.format(caption=text)

    @property
    def every(self) -> tuple[str, ...] | None:
        """Every caption that a visit can draw; None if augmented tags make them too many to list."""
        if self.tags is not None and self.tags.vary:
            return None
        return tuple(self.template.format(caption=text) for text in self.texts)


def stream(draws: Draws, purpose: str) -> torch.Generator:
    """A random generator of the one sample in `draws`."""
    return generator(draws.run_seed, purpose, draws.keys[0], draws.visits[0])


def checked_template(key: str, template: str, *fields: str) -> str:
    """The template. Raises UserError if it has other fields than `{caption}` and `fields`.

    Attributes, indices, conversions and format specifications are refused: they read what is inside of Python's
    objects, or make a caption of a billion spaces.
    """
    known = ("caption", *fields)
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{key}={template!r}: {error}; a brace of the text itself is written twice") from error
    for _, field, spec, conversion in parts:
        if field is not None and (field not in known or spec or conversion):
            listed = ", ".join(f"{{{name}}}" for name in known)
            raise UserError(f"{key}={template!r}: its fields can be {listed}, and nothing else in the braces")
    return template


def checked_texts(texts: Sequence[str]) -> tuple[str, ...]:
    """Captions with white space collapsed. Raises ValueError for an empty one, or none."""
    lines = tuple(" ".join(text.split()) for text in texts)
    if not lines:
        raise ValueError("has no caption")
    if any("\0" in line for line in lines):
        raise ValueError("has a caption with a zero byte")
    if not all(lines):
        raise ValueError("has an empty caption")
    return lines
