"""What diffusers keeps of a LoRA's ranks and alphas: the peft configuration of each part, as JSON in the metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import isfinite, sqrt
from typing import Any

from sdft.errors import UserError
from sdft.formats import lora_keys
from sdft.formats.lora_layer import LoraFile, most_common

ADAPTER_METADATA = "lora_adapter_metadata"
"""The metadata key where diffusers keeps the peft configuration of each part, as JSON."""


def adapter_metadata(lora: LoraFile) -> dict[str, Any]:
    """The peft configuration as diffusers reads it; ranks and alphas that differ from the most common are patterns."""
    metadata: dict[str, Any] = {}
    for part in lora_keys.PARTS:
        # transformers 5 dropped `text_model.` from text encoder 1; peft matches the end of a name in both versions.
        short = {module.removeprefix("text_model."): layer for module, layer in lora.of_part(part).items()}
        if not short:
            continue
        rank = most_common([layer.rank for layer in short.values()])
        alpha = most_common([layer.alpha for layer in short.values()])
        config = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {name: layer.rank for name, layer in short.items() if layer.rank != rank},
            "alpha_pattern": {name: layer.alpha for name, layer in short.items() if layer.alpha != alpha},
            "target_modules": sorted(short),
            "use_dora": any(layer.kind == "dora" for layer in short.values()),
        }
        metadata |= {f"{part}.{name}": value for name, value in config.items()}
    return metadata


def alphas_from_metadata(metadata: Mapping[str, str], key: str) -> Callable[[str, int | None], float]:
    """(layer, rank) -> alpha of a layer that has no alpha tensor: from diffusers' metadata, else its rank."""
    try:
        stated = dict(json.loads(metadata.get(ADAPTER_METADATA) or "{}"))
        patterns = {part: dict(stated.get(f"{part}.alpha_pattern") or {}) for part in lora_keys.PARTS}
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{key}: its {ADAPTER_METADATA} is not what diffusers writes ({error})") from error
    alphas = [stated.get(f"{part}.lora_alpha", 1) for part in lora_keys.PARTS]
    for alpha in (*alphas, *(alpha for named in patterns.values() for alpha in named.values())):
        if not isinstance(alpha, int | float) or not isfinite(alpha):
            raise UserError(f"{key}: its {ADAPTER_METADATA} has an alpha that is no number: {str(alpha)[:40]}")

    def alpha_of(layer: str, rank: int | None) -> float:
        part, _, module = layer.partition("/")
        if rank is None or f"{part}.lora_alpha" not in stated:
            return float(rank or 1)
        named = (alpha for name, alpha in patterns[part].items() if f".{module}".endswith(f".{name}"))
        alpha = next(named, stated[f"{part}.lora_alpha"])
        return float(alpha * sqrt(rank) if stated.get(f"{part}.use_rslora") else alpha)

    return alpha_of
