"""Norms and biases that train beside an adapter (BitFit, arXiv:2106.10199), and how to restore them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from sdft.distributed.sharding import shard_like
from sdft.errors import UserError
from sdft.protocols import DiffusionModel

NORMS = nn.LayerNorm | nn.GroupNorm


def unfreeze(
    model: DiffusionModel,
    parts: Iterable[str],
    norms: bool,
    biases: bool,
    chosen: Callable[[str], bool] = lambda name: True,
) -> dict[str, Tensor]:
    """Let norms, and the biases of adapted layers, train; the initial values by parameter name, on the CPU.

    norms: weights and biases of all LayerNorms and GroupNorms of `parts`.
    biases: of all layers of `parts` with an adapter.
    chosen: whether to train a norm, by its name, `part.module`.

    To be called after the adapters are there. Parameters keep their dtype; those that never receive a gradient stay
    frozen. Raises UserError if no norm is left to train.
    """
    initial = {}
    for part in parts:
        untrained = model.untrained_parameters(part)
        for name, module in model.get_submodule(part).named_modules():
            found: dict[str, nn.Parameter | None] = {}
            if norms and isinstance(module, NORMS) and chosen(f"{part}.{name}"):
                found = {f"{name}.{leaf}": p for leaf, p in module.named_parameters()}
                if isinstance(module, nn.GroupNorm):
                    module.register_forward_pre_hook(with_gradient)
            elif biases and name.endswith(".base_layer") and isinstance(module, nn.Linear | nn.Conv2d):
                found = {f"{name}.bias": module.bias}
            for parameter, p in found.items():
                if p is not None and parameter.replace(".base_layer", "") not in untrained:
                    p.requires_grad_(True)
                    device = "meta" if p.is_meta else "cpu"  # a forecast has no values
                    initial[f"{part}.{parameter}"] = p.detach().to(device, copy=True)
    if norms and not any("norm" in name for name in initial):
        raise UserError("tuning.train_norms=true: tuning.include and tuning.exclude leave no norm; widen one of them")
    return initial


def with_gradient(norm: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook that lets the input of a norm require a gradient, which the first norm's has no other use for.

    Without one, torch (2.13, on the CPU) crashes in the backward pass of a GroupNorm whose input is channels_last.
    """
    x, *others = arguments
    needed = torch.is_grad_enabled() and not x.requires_grad
    return (x.detach().requires_grad_() if needed else x, *others)


def restored(model: nn.Module, initial: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    """Inside the `with`, the parameters have their initial values."""
    return scaled(model, initial, 0.0)


@contextmanager
@torch.no_grad()
def scaled(model: nn.Module, initial: Mapping[str, Tensor], strength: float) -> Iterator[None]:
    """Inside the `with`, the parameters have `strength` times their change since their initial values."""
    parameters = {name: p for name, p in model.named_parameters() if name in initial}
    trained = {name: p.detach().clone() for name, p in parameters.items()}
    for name, p in parameters.items():
        before = shard_like(p, initial[name])
        p.copy_(before if strength == 0 else torch.lerp(before.to(p), trained[name], strength))
    try:
        yield
    finally:
        for name, p in parameters.items():
            p.copy_(trained[name])
