"""The captions of one sample, and which words a visit learns of them.

Pure text: knows neither tokenizers nor where captions lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sdft.errors import UserError
from sdft.rng import Draws, generator
from sdft.types import Fraction, Index


class Tags:
    """Captions as lists of tags, told a little differently at each visit.

    shuffle: tags change places.
    keep_first: so many tags keep their place and are never dropped.
    drop: share of the other tags that a visit leaves out; the last one is never left out.
    separator: between the tags.
    """

    def __init__(self, shuffle: bool = False, keep_first: Index = 0, drop: Fraction = 0.0, separator: str = ","):
        if not separator.strip():
            raise UserError(f"data.tags.separator={separator!r}: must be more than white space, such as ','")
        if keep_first and not shuffle and not drop:
            raise UserError(f"data.tags.keep_first={keep_first} means nothing without data.tags.shuffle or .drop")
        self.shuffle, self.keep_first, self.drop, self.separator = shuffle, keep_first, drop, separator

    @property
    def vary(self) -> bool:
        """Whether two visits can differ."""
        return self.shuffle or self.drop > 0

    def __call__(self, text: str, draws: Draws) -> str:
        """The tags of `text` as one visit learns them."""
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
    """What one sample can be called.

    texts: its captions; a visit learns one of them.
    weights: how often each, relative to the others; all the same where empty.
    template: how the text becomes the caption: `{caption}, dreamy` puts a word behind it.
    tags: how texts that are lists of tags vary; None leaves them as they are.
    """

    texts: tuple[str, ...]
    weights: tuple[float, ...] = ()
    template: str = "{caption}"
    tags: Tags | None = None

    @property
    def plain(self) -> str:
        """The first text as it stands, for validation."""
        return self.template.format(caption=self.texts[0])

    def told(self, draws: Draws) -> str:
        """The caption of one visit."""
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
        """Every caption a visit can give; None where tags make them too many to list."""
        if self.tags is not None and self.tags.vary:
            return None
        return tuple(self.template.format(caption=text) for text in self.texts)


def stream(draws: Draws, purpose: str) -> torch.Generator:
    """The generator of the one sample of `draws`."""
    return generator(draws.run_seed, purpose, draws.keys[0], draws.visits[0])


def checked_template(key: str, template: str, *fields: str) -> str:
    """The template, if its fields are `{caption}` and `fields`."""
    try:
        template.format(caption="", **{field: "" for field in fields})
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        known = ", ".join(f"{{{field}}}" for field in ("caption", *fields))
        raise UserError(f"{key}={template!r}: its fields can be {known} ({error!r})") from error
    return template


def checked_texts(texts: Sequence[str]) -> tuple[str, ...]:
    """Captions on one line each; ValueError, with the reason, where there is nothing to learn."""
    lines = tuple(" ".join(text.split()) for text in texts)
    if not lines:
        raise ValueError("has no caption")
    if not all(lines):
        raise ValueError("has an empty caption")
    return lines
