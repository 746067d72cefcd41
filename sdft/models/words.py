"""New words: trainable rows appended to a frozen token embedding (textual inversion, arXiv:2208.01618)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AddedToken, CLIPTokenizer

from sdft.errors import UserError


class ExtendedEmbedding(nn.Module):
    """A frozen embedding table with trainable rows after it; ids past the table look up the rows."""

    def __init__(self, table: nn.Embedding, rows_ND: Tensor):
        super().__init__()
        self.table, self.rows_ND = table, nn.Parameter(rows_ND)

    @property
    def weight(self) -> Tensor:
        """The frozen table: transformers reads its dtype."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        size = self.table.num_embeddings
        known = self.table(ids.clamp(max=size - 1))
        new = F.embedding((ids - size).clamp(min=0), self.rows_ND).to(known.dtype)
        return torch.where((ids >= size).unsqueeze(-1), new, known)


def tokens_of(word: str, num_vectors: int) -> list[str]:
    """The tokens of a word of several vectors, as diffusers names them: `zorbix`, `zorbix_1`, `zorbix_2` ..."""
    return [word, *(f"{word}_{i}" for i in range(1, num_vectors))]


def add_words(
    tokenizer: CLIPTokenizer, table: nn.Embedding, words: Mapping[str, str], vectors: Mapping[str, int] = {}
) -> ExtendedEmbedding:
    """Make each word one token, or as many as it has vectors, with consecutive ids.

    They start from the embeddings of its phrase if they are as many, else each from their mean.

    Raises UserError for words that differ only in case, that the tokenizer knows, or that have an empty phrase.
    """
    if len({word.lower() for word in words}) < len(words):
        raise UserError(f"tuning.new_words: {sorted(words)} are not all different, ignoring case")
    rows: list[Tensor] = []
    for word, phrase in words.items():
        # Also pieces of words that the BPE vocabulary has: adding one would change nothing.
        if len(tokenizer.tokenize(word)) < 2 or word.lower() in tokenizer.get_vocab():
            raise UserError(f"tuning.new_words: the tokenizer already knows {word!r}; choose another word")
        ids = tokenizer(phrase, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"tuning.new_words: the initial phrase of {word!r} is empty")
        rows_ND, num_vectors = table.weight[ids].detach().float(), vectors.get(word, 1)
        rows.extend(rows_ND if len(ids) == num_vectors else [rows_ND.mean(0)] * num_vectors)
    tokens = [token for word in words for token in tokens_of(word, vectors.get(word, 1))]
    # Whole words only: `neo` must not split `neon`.
    tokenizer.add_tokens([AddedToken(token, single_word=True, normalized=True) for token in tokens])
    return ExtendedEmbedding(table, torch.stack(rows))
