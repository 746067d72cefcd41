"""`Full`: every weight of the chosen parts trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sdft.errors import UserError
from sdft.tuning.parameters import copy_parameters, parameter_groups, trainable_parameters
from sdft.tuning.targets import (
    freeze_unused_layers,
)
from sdft.types import NonNegative


class Full:
    """Every weight of `parts` learns.

    lr_scale: a part's learning rate as a multiple of the run's.
    """

    def __init__(self, parts: Sequence[str] = ("unet",), lr_scale: Mapping[str, NonNegative] | None = None):
        self.parts, self.lr_scale = tuple(parts), dict(lr_scale or {})
        unknown = set(self.lr_scale) - set(self.parts)
        if unknown:
            raise UserError(f"tuning.lr_scale names {sorted(unknown)}, which tuning.parts does not train")
        self._initial: dict[str, Tensor] = {}

    def attach(self, model: nn.Module) -> None:
        """Freeze the model but for `parts`, and remember the initial weights."""
        model.requires_grad_(False)
        for part in self.parts:
            model.get_submodule(part).requires_grad_(True)
            freeze_unused_layers(part, model.get_submodule(part))
        self._initial = {name: p.detach().cpu().clone() for name, p in trainable_parameters(model)}

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """One parameter group a part, with its `name` and `lr_scale`."""
        return parameter_groups(model, self.parts, self.lr_scale)

    @contextmanager
    def base(self, model: nn.Module) -> Iterator[None]:
        """The model as it was before training, inside the `with`."""
        tuned = {name: p.detach().clone() for name, p in trainable_parameters(model)}
        copy_parameters(model, self._initial)
        try:
            yield
        finally:
            copy_parameters(model, tuned)
