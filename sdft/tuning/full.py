"""`Full`: every weight of the chosen parts trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdft.distributed.sharding import shard_like
from sdft.errors import UserError
from sdft.protocols import DiffusionModel, Tuning
from sdft.tuning.parameters import copy_parameters, parameter_groups, part_of, trainable_parameters
from sdft.tuning.stops import read_stops
from sdft.types import Fraction, NonNegative


class Full(Tuning):
    """Train every weight of `parts`, except those that never receive a gradient.

    parts: names of the model's submodules, such as `unet`, and of parameters of its own, such as CLIP's `logit_scale`.
    lr_scale: learning rate of a part as a multiple of the run's.
    stop_at: part -> share of the run's steps after which it is frozen.
    decay_to_base: weight decay towards the initial weights instead of 0 (L2-SP, arXiv:1802.01483, decoupled from the
        gradient as in AdamW): after each step, a weight loses rate x this x its change so far. The initial weights are
        read from the CPU at each step.
    """

    def __init__(
        self,
        parts: Sequence[str] = ("unet",),
        lr_scale: Mapping[str, NonNegative] | None = None,
        stop_at: Mapping[str, Fraction] | None = None,
        decay_to_base: NonNegative = 0.0,
    ):
        self.parts, self.lr_scale, self.decay_to_base = tuple(parts), dict(lr_scale or {}), decay_to_base
        self.stop_at = read_stops(stop_at, self.parts)
        unknown = set(self.lr_scale) - set(self.parts)
        if unknown:
            raise UserError(f"tuning.lr_scale names {sorted(unknown)}, which tuning.parts does not train")
        self.initial: dict[str, Tensor] = {}

    def attach(self, model: nn.Module) -> None:
        """Freeze the model except for `parts`, and keep a copy of their initial weights on the CPU.

        Weights that come from a file in half precision are kept so, without loss.
        """
        unused: set[str] = set()
        if isinstance(model, DiffusionModel):
            unused = {f"{part}.{name}" for part in self.parts for name in model.untrained_parameters(part)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) in self.parts and name not in unused)
        self.initial = {name: narrowest(p.detach().cpu()) for name, p in trainable_parameters(model)}

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """One parameter group per part."""
        groups = parameter_groups(model, self.parts, self.lr_scale)
        return [group | {"weight_decay": 0.0} for group in groups] if self.decay_to_base else groups

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if not self.decay_to_base:
            return
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for name, p in trainable_parameters(model):
            initial = shard_like(p, self.initial[name]).to(p.device, p.dtype)
            p.lerp_(initial, rates[id(p)] * self.decay_to_base)

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
