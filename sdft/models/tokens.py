"""How many tokens a caption has, without loading a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.utils import logging

from sdft.models.nano import WEIGHTS as NANO
from sdft.types import UserError


def token_counter(weights: str, config: str) -> Callable[[str], int]:
    """Counts tokens, start and end included, as both tokenizers of a model do: they differ in the padding alone.

    weights: as `models.load.pretrained` takes it; config: what has the tokenizers where `weights` is one file.
    """
    logging.set_verbosity_error()  # it warns of long captions, which are what is being counted
    file = Path(weights).expanduser().is_file()
    key, source = ("model.config", config) if file else ("model.weights", weights)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(NANO if source == "nano" else source, subfolder="tokenizer")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}={source}: its tokenizer is not there; pass {key}=FOLDER or a hub id that was fetched before, or "
            "~model to count no tokens"
        ) from error
    return lambda caption: len(tokenizer(caption).input_ids)
