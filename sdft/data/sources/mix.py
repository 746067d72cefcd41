"""Several sources as one, with repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from sdft.data.decode import StoredImage
from sdft.data.packed_strings import Concatenated, PackedStrings
from sdft.data.source import (
    Sample,
    Source,
    StoredSource,
    left_out,
    prefetch,
    shard_numbers,
    shards_that_fit,
    stored_image,
    stored_mask,
)
from sdft.errors import UserError
from sdft.types import Count, Positive


class Mix(StoredSource):
    """Several sources as one. Captions and loss weights are those of each source: a regularisation set is a source with
    captions without the new word and its own `loss_weight`.

    sources: name -> source; the name becomes a prefix of the keys.
    repeats: name -> number of times that each image is read per pass; 1 by default.
    weights: instead of repeats, name -> relative share of a pass; rounded to whole repeats, at least 1.

    Raises UserError for unknown names, and for repeats together with weights.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        repeats: dict[str, Count] | None = None,
        weights: dict[str, Positive] | None = None,
    ):
        for name, given in (("repeats", repeats), ("weights", weights)):
            if unknown := set(given or {}) - set(sources):
                raise UserError(f"data.{name} names {sorted(unknown)}; the sources are {sorted(sources)}")
        if repeats and weights:
            raise UserError("data.repeats and data.weights exclude each other; set one of them")
        if weights and (missing := set(sources) - set(weights)):
            raise UserError(f"data.weights lacks {sorted(missing)}; give every source a weight")
        self.repeats = repeats_of(sources, weights) if weights else repeats or {}
        rounds = [(name, again) for name in sources for again in range(self.repeats.get(name, 1))]
        self._rounds = [sources[name] for name, _ in rounds]
        self._all = Concatenated(len(source.keys) for source in self._rounds)
        self.keys = PackedStrings(
            f"{name}/{key}" + (f"#{again}" if again else "") for name, again in rounds for key in sources[name].keys
        )

    @property
    def left_out(self) -> list[str]:
        """What the sources have left out."""
        return list(dict.fromkeys(line for source in self._rounds for line in left_out(source)))

    def _locate(self, position: int) -> tuple[Source, int]:
        round_, index = self._all.locate(position)
        return self._rounds[round_], index

    def __getitem__(self, position: int) -> Sample:
        source, index = self._locate(position)
        return replace(source[index], key=self.keys[position])

    def stored(self, position: int) -> StoredImage | None:
        return stored_image(*self._locate(position))

    def mask(self, position: int) -> StoredImage | None:
        return stored_mask(*self._locate(position))

    def shard_numbers(self) -> np.ndarray | None:
        """Shards of one source are told from those of another; and a source without counts as one shard."""
        if all(shard_numbers(source) is None for source in self._rounds):
            return None
        found: list[np.ndarray] = []
        by_source: dict[int, np.ndarray] = {}
        first = 0
        for source in self._rounds:
            if id(source) not in by_source:
                numbers = shard_numbers(source)
                by_source[id(source)] = first + (np.zeros(len(source.keys), int) if numbers is None else numbers)
                first = int(by_source[id(source)].max(initial=first)) + 1
            found.append(by_source[id(source)])
        return np.concatenate(found)

    def shards_that_fit(self) -> int | None:
        found = [num for source in self._rounds if (num := shards_that_fit(source)) is not None]
        return min(found, default=None)

    def prefetch(self, positions: Sequence[int]) -> None:
        for position in positions:
            source, index = self._locate(position)
            prefetch(source, [index])


def repeats_of(sources: Mapping[str, Source], weights: Mapping[str, float]) -> dict[str, int]:
    """Whole repeats whose shares of a pass approximate the weights; the smallest is 1."""
    wanted = {name: weights[name] / len(source.keys) for name, source in sources.items()}
    least = min(wanted.values())
    return {name: max(1, round(want / least)) for name, want in wanted.items()}
