"""Which layers get an adapter, and with which rank and alpha. Names are `part.module`, such as
`unet.mid_block.attentions.0.proj_in`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from sdft.errors import UserError, did_you_mean
from sdft.protocols import DiffusionModel

T = TypeVar("T")
BLOCKS = ("unet.down_blocks.*", "unet.mid_block.*", "unet.up_blocks.*", "unet.up_blocks.0.attentions.1.*")
"""Examples of patterns."""


def target_names(
    model: DiffusionModel, parts: Sequence[str], layers: str, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[str]:
    """The names of the layers that get an adapter.

    layers: a choice of `ADAPTER_LAYERS`. include: patterns of names, of which a layer must match one, if there are any.
    exclude: patterns of which it must match none. In patterns, `*` stands for any text, with dots.

    Raises UserError for a pattern that matches no layer, and if no layer is left.
    """
    found = []
    for part in parts:
        suffixes = tuple(f".{suffix}" for suffix in model.ADAPTER_LAYERS[part][layers])
        untrained = model.untrained_parameters(part)
        names = (name for name, _ in model.get_submodule(part).named_modules() if name.endswith(suffixes))
        found += [f"{part}.{name}" for name in names if f"{name}.weight" not in untrained]
    refuse_without_match("tuning.include", include, found)
    refuse_without_match("tuning.exclude", exclude, found)
    kept = [name for name in found if is_chosen(name, include, exclude)]
    if not kept:
        raise UserError("tuning.include and tuning.exclude leave no layer; widen one of them")
    if without := [part for part in parts if not any(name.startswith(f"{part}.") for name in kept)]:
        raise UserError(f"tuning.include and tuning.exclude leave no layer of {without[0]}; change tuning.parts")
    return kept


def is_chosen(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether a name matches one of `include`, if there are any, and none of `exclude`."""
    return (not include or matches(name, include)) and not matches(name, exclude)


def by_pattern(key: str, names: Sequence[str], patterns: Mapping[str, T], other: T) -> dict[str, T]:
    """The value of each name: of the last pattern that it matches, else `other`.

    Raises UserError, in the name of the config key, for a pattern that matches no name.
    """
    refuse_without_match(key, patterns, names)
    values = dict.fromkeys(names, other)
    for pattern, value in patterns.items():
        values |= {name: value for name in names if fnmatchcase(name, pattern)}
    return values


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def refuse_without_match(key: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raise UserError for a pattern that matches no name."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            guess = did_you_mean(pattern, [*names, *BLOCKS]) or f"; patterns are such as {BLOCKS[2]!r}"
            raise UserError(f"{key}: {pattern!r} matches none of the {len(names)} layers with adapters{guess}")


def is_convolution(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of more than one pixel."""
    return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
