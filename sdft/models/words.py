"""New words: extra rows of a token embedding, apart from the frozen table.

Knows one embedding layer and its tokenizer; does not know which encoder they belong to.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AddedToken, CLIPTokenizer

from sdft.errors import UserError


class ExtendedEmbedding(nn.Module):
    """A frozen embedding table and a few learned rows after it; ids past the table read the rows."""

    def __init__(self, table: nn.Embedding, rows_ND: Tensor):
        super().__init__()
        self.table, self.rows_ND = table, nn.Parameter(rows_ND)

    @property
    def weight(self) -> Tensor:
        """The frozen table: transformers asks it for its dtype."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        size = self.table.num_embeddings
        known = self.table(ids.clamp(max=size - 1))
        new = F.embedding((ids - size).clamp(min=0), self.rows_ND).to(known.dtype)
        return torch.where((ids >= size).unsqueeze(-1), new, known)


def add_words(tokenizer: CLIPTokenizer, table: nn.Embedding, words: Mapping[str, str]) -> ExtendedEmbedding:
    """Make each word one token, starting as the mean embedding of its phrase."""
    if len({word.lower() for word in words}) < len(words):
        raise UserError(f"tuning.new_words: {sorted(words)} are not all different; case does not count")
    rows = []
    for word, phrase in words.items():
        # Also a piece of words, which BPE may hold without it being a word: adding it would change nothing.
        if len(tokenizer.tokenize(word)) < 2 or word.lower() in tokenizer.get_vocab():
            raise UserError(f"tuning.new_words: the tokenizer knows {word!r} already; invent another word")
        ids = tokenizer(phrase, add_special_tokens=False).input_ids
        if not ids:
            raise UserError(f"tuning.new_words: the initial phrase of {word!r} is empty")
        rows.append(table.weight[ids].detach().float().mean(0))
    # As whole words only: `neo` must not cut `neon` in two.
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    return ExtendedEmbedding(table, torch.stack(rows))
