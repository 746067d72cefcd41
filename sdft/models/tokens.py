"""How many tokens a caption has, without loading a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.utils import logging

from sdft.errors import UserError
from sdft.models.load import find_folder


def token_counter(weights: str, config: str) -> Callable[[str], int]:
    """Counts tokens, start and end included, as both tokenizers of a model do: they differ in the padding alone.

    weights: as in `sdft.models.load.pretrained`.
    config: a folder or Hub id with the tokenizers, if `weights` is a single file.
    """
    logging.set_verbosity_error()  # it warns of long captions, which are counted here
    file = Path(weights).expanduser().is_file()
    key, source = ("model.config", config) if file else ("model.weights", weights)
    folder = find_folder(key, source, ("tokenizer/*",)) / "tokenizer"
    if not folder.is_dir():  # transformers would create an empty tokenizer
        raise UserError(f"{key}={source}: has no folder 'tokenizer'; pass another, or ~model to count no tokens")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return lambda caption: len(tokenizer(caption).input_ids)
