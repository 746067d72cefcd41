"""New words: their embeddings train, beside an adapter (pivotal tuning) or alone (textual inversion)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdft.distributed.sharding import shard_like
from sdft.errors import UserError
from sdft.protocols import DiffusionModel, Tuning
from sdft.tuning.parameters import WORDS, parameter_groups
from sdft.tuning.stops import read_stops
from sdft.types import Count, Fraction, NonNegative

Vectors = Count | Mapping[str, Count]


class NewWords:
    """The embeddings of new words in both text encoders.

    words: word -> initial phrase, whose mean embedding each vector of the word starts from; a phrase of as many tokens
        as the word has vectors gives each its own.
    vectors: number of vectors of each word, or of words by name; the others of a word follow it in the prompt.

    Raises UserError for numbers of vectors of words that are not new.
    """

    def __init__(self, words: Mapping[str, str], vectors: Vectors = 1):
        self.words = dict(words)
        self.vectors = dict.fromkeys(words, vectors) if isinstance(vectors, int) else dict(vectors)
        if unknown := sorted(set(self.vectors) - set(self.words)):
            raise UserError(f"tuning.vectors names {unknown}; tuning.new_words has {sorted(self.words)}")
        self._initial_rows: dict[str, Tensor] = {}

    def attach(self, model: DiffusionModel) -> None:
        """Add the words to the model."""
        model.add_words(self.words, self.vectors)
        self._initial_rows = {name: rows.detach().clone() for name, rows in model.word_rows.items()}

    @contextmanager
    def initial(self, model: Any) -> Iterator[None]:
        """Inside the `with`, the words have their initial embeddings."""
        with torch.no_grad():
            learned = {name: rows.clone() for name, rows in model.word_rows.items()}
            for name, rows in model.word_rows.items():
                rows.copy_(shard_like(rows, self._initial_rows[name]))
            try:
                yield
            finally:
                for name, rows in model.word_rows.items():
                    rows.copy_(learned[name])


class Words(Tuning):
    """Train the embeddings of new words, and no other weight (textual inversion, Gal et al., arXiv:2208.01618).

    new_words: word -> initial phrase, from which its embedding starts.
    vectors: number of vectors of each word, or of words by name; more learn a look better, and leave less room in the
        prompt.
    lr_scale: `words` -> learning rate as a multiple of the run's.
    stop_at: `words` -> share of the run's steps after which the embeddings are frozen.

    Raises UserError without a word.
    """

    parts = ()
    trains_adapters = True

    def __init__(
        self,
        new_words: Mapping[str, str],
        vectors: Vectors = 1,
        lr_scale: Mapping[str, NonNegative] | None = None,
        stop_at: Mapping[str, Fraction] | None = None,
    ):
        if not new_words:
            raise UserError(
                "tuning.new_words: tuning=words trains new words; name one with the phrase it starts from, as in "
                "'tuning.new_words={zorbix: a neon robot}'"
            )
        self._words, self.lr_scale = NewWords(new_words, vectors), dict(lr_scale or {})
        self.new_words, self.stop_at = self._words.words, read_stops(stop_at, (WORDS,))
        if unknown := sorted(set(self.lr_scale) - {WORDS}):
            raise UserError(
                f"tuning.lr_scale names {unknown}, which tuning=words does not train; pass '~tuning.lr_scale'"
            )

    def attach(self, model: DiffusionModel) -> None:  # type: ignore[override]
        """Freeze the model, then add the embeddings of the new words."""
        model.requires_grad_(False)
        self._words.attach(model)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return parameter_groups(model, (WORDS,), self.lr_scale)

    @contextmanager
    def base(self, model: nn.Module) -> Iterator[None]:
        """Inside the `with`, the words have their initial embeddings."""
        with self._words.initial(model):
            yield
