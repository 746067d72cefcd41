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


def add_words(tokenizer: CLIPTokenizer, table: nn.Embedding, words: Mapping[str, str]) -> ExtendedEmbedding:
    """Make each word one token, initialised with the mean embedding of its phrase.

    Raises UserError for words that differ only in case, that the tokenizer knows, or that have an empty phrase.
    """
    if len({word.lower() for word in words}) < len(words):
        raise UserError(f"tuning.new_words: {sorted(words)} are not all different, ignoring case")
    rows = []
    for word, phrase in words.items():
        # Also pieces of words that the BPE vocabulary has: adding one would change nothing.
        if len(tokenizer.tokenize(word)) < 2 or word.lower() in tokenizer.get_vocab():
            raise UserError(f"tuning.new_words: the tokenizer already knows {word!r}; choose another word")
        ids = tokenizer(phrase, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"tuning.new_words: the initial phrase of {word!r} is empty")
        rows.append(table.weight[ids].detach().float().mean(0))
    # Whole words only: `neo` must not split `neon`.
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    return ExtendedEmbedding(table, torch.stack(rows))
