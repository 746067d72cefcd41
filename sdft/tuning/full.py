"""`Full`: every weight of the chosen parts trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdft.errors import UserError
from sdft.protocols import DiffusionModel, Tuning
from sdft.tuning.parameters import copy_parameters, parameter_groups, trainable_parameters
from sdft.types import NonNegative


class Full(Tuning):
    """Train every weight of `parts`, except those that never receive a gradient.

    parts: names of the model's submodules, such as `unet`.
    lr_scale: learning rate of a part as a multiple of the run's.
    """

    def __init__(self, parts: Sequence[str] = ("unet",), lr_scale: Mapping[str, NonNegative] | None = None):
        self.parts, self.lr_scale = tuple(parts), dict(lr_scale or {})
        unknown = set(self.lr_scale) - set(self.parts)
        if unknown:
            raise UserError(f"tuning.lr_scale names {sorted(unknown)}, which tuning.parts does not train")
        self.initial: dict[str, Tensor] = {}

    def attach(self, model: nn.Module) -> None:
        """Freeze the model except for `parts`, and keep a copy of their initial weights on the CPU.

        Weights that come from a file in half precision are kept so, without loss.
        """
        model.requires_grad_(False)
        for part in self.parts:
            untrained = model.untrained_parameters(part) if isinstance(model, DiffusionModel) else set()
            for name, parameter in model.get_submodule(part).named_parameters():
                parameter.requires_grad_(name not in untrained)
        self.initial = {name: narrowest(p.detach().cpu()) for name, p in trainable_parameters(model)}

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """One parameter group per part."""
        return parameter_groups(model, self.parts, self.lr_scale)

    @contextmanager
    def base(self, model: nn.Module) -> Iterator[None]:
        """Inside the `with`, the model has its initial weights."""
        tuned = {name: p.detach().to("cpu", copy=True) for name, p in trainable_parameters(model)}
        copy_parameters(model, self.initial)
        try:
            yield
        finally:
            copy_parameters(model, tuned)


def narrowest(weight: Tensor) -> Tensor:
    """A copy of a weight in the first dtype of half precision that holds all of its values exactly, else in its own."""
    for dtype in (torch.float16, torch.bfloat16) if not weight.is_meta else ():
        half = weight.to(dtype)
        if torch.equal(half.to(weight.dtype), weight):
            return half if half is not weight else half.clone()
    return weight.clone()
