"""How many tokens a caption has, without loading a model."""

from __future__ import annotations

from collections.abc import Callable

from transformers import CLIPTokenizer
from transformers.utils import logging

from sdft.models.nano import WEIGHTS as NANO
from sdft.types import UserError


def token_counter(weights: str) -> Callable[[str], int]:
    """Counts tokens, start and end included, as the first tokenizer of `weights` does.

    weights: `nano`, a hub id or a diffusers folder.
    """
    logging.set_verbosity_error()  # it warns of long captions, which are what is being counted
    try:
        tokenizer = CLIPTokenizer.from_pretrained(NANO if weights == "nano" else weights, subfolder="tokenizer")
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer={weights}: not found; pass a diffusers folder, a hub id, nano or null") from error
    return lambda caption: len(tokenizer(caption).input_ids)
