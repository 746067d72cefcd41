"""Several sources as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sdft.data.source import Sample, Source
from sdft.data.decode import StoredImage
from sdft.data.packed_strings import Concatenated, PackedStrings
from sdft.data.sources.splits import stored
from sdft.errors import UserError
from sdft.types import Count, Positive


class Mix:
    """Several sources, each repeated as often as said. Captions and loss weight are each source's own: a
    regularisation set is a source with captions without the new word and a `loss_weight`.

    sources: name -> source; the name becomes part of the keys.
    repeats: name -> how often a pass over the data shows each of its pictures; 1 where not said.
    weights: name -> share of the pass, relative to the others; becomes the nearest whole repeats, at least 1.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        repeats: dict[str, Count] | None = None,
        weights: dict[str, Positive] | None = None,
    ):
        for name, said in (("repeats", repeats), ("weights", weights)):
            if unknown := set(said or {}) - set(sources):
                raise UserError(f"data.{name} names {sorted(unknown)}; the sources are {sorted(sources)}")
        if repeats and weights:
            raise UserError("data.repeats and data.weights say the same in two ways; set one of them")
        if weights and (silent := set(sources) - set(weights)):
            raise UserError(f"data.weights says nothing of {sorted(silent)}; give every source its share")
        self.repeats = repeats_of(sources, weights) if weights else repeats or {}
        rounds = [(name, again) for name in sources for again in range(self.repeats.get(name, 1))]
        self._rounds = [sources[name] for name, _ in rounds]
        self._all = Concatenated(len(source.keys) for source in self._rounds)
        self.keys = PackedStrings(
            f"{name}/{key}" + (f"#{again}" if again else "") for name, again in rounds for key in sources[name].keys
        )

    def _place(self, position: int) -> tuple[Source, int]:
        round_, index = self._all.locate(position)
        return self._rounds[round_], index

    def __getitem__(self, position: int) -> Sample:
        source, index = self._place(position)
        return replace(source[index], key=self.keys[position])

    def stored(self, position: int) -> StoredImage | None:
        return stored(*self._place(position))


def repeats_of(sources: Mapping[str, Source], weights: Mapping[str, float]) -> dict[str, int]:
    """Whole repeats whose shares of a pass are near the weights; the source that needs least is shown once."""
    wanted = {name: weights[name] / len(source.keys) for name, source in sources.items()}
    least = min(wanted.values())
    return {name: max(1, round(want / least)) for name, want in wanted.items()}
