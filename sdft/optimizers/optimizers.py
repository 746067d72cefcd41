"""Optimizers with checked arguments and defaults for fine-tuning.

Any other optimizer class can be chosen by its own name: `optimizer._target_=torch.optim.RAdam`. The parameter groups
hold the learning rate factors of the parts, and no weight decay for norms and biases (`sdft.tuning.parameters`).

The algorithms are those of libraries: torch; pytorch-optimizer, which is small, needs only torch, and agrees with the
authors' own packages (lion-pytorch, came-pytorch, prodigyopt, schedulefree) to rounding; transformers, whose Adafactor
takes a fixed rate; and bitsandbytes, an extra because its GPU kernels have 120 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt

from sdft.errors import UserError
from sdft.types import Count, NonNegative, Positive

Groups = Iterable[dict[str, Any]]
Momentum = Annotated[float, Ge(0), Lt(1)]


def adamw(
    groups: Groups,
    lr: Positive,
    betas: tuple[Momentum, Momentum] = (0.9, 0.99),
    weight_decay: NonNegative = 0.01,
    eps: Positive = 1e-8,
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101), with one fused kernel on GPUs and multi-tensor updates on CPUs."""
    groups = list(groups)
    kernel: dict[str, Any] = {"fused": True} if on_gpu(groups) else {"foreach": True}
    return torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), weight_decay=weight_decay, eps=eps, **kernel)


def adamw_8bit(
    groups: Groups,
    lr: Positive,
    betas: tuple[Momentum, Momentum] = (0.9, 0.99),
    weight_decay: NonNegative = 0.01,
    eps: Positive = 1e-8,
) -> torch.optim.Optimizer:
    """AdamW whose states take one byte each, quantised by blocks (arXiv:2110.02861): 2 bytes per weight, not 8.

    Weights of fewer than 4096 elements keep states of 32 bits.
    """
    optim = bitsandbytes("optimizer=adamw_8bit").optim
    return optim.AdamW8bit(list(groups), lr=lr, betas=tuple(betas), weight_decay=weight_decay, eps=eps)


def adafactor(
    groups: Groups,
    lr: Positive,
    weight_decay: NonNegative = 0.0,
    clip_threshold: Positive = 1.0,
    decay_rate: Annotated[float, Ge(-1), Lt(0)] = -0.8,
) -> torch.optim.Optimizer:
    """Adafactor (arXiv:1804.04235) with the given rate: second moments by rows and columns, without a first moment.

    clip_threshold: largest root mean square of an update before the rate. decay_rate: power of the step, by which the
        second moments' decay approaches 1.
    """
    from transformers.optimization import Adafactor

    return Adafactor(
        list(groups),
        lr=lr,
        weight_decay=weight_decay,
        clip_threshold=clip_threshold,
        decay_rate=decay_rate,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )


def lion(
    groups: Groups, lr: Positive, betas: tuple[Momentum, Momentum] = (0.98, 0.99), weight_decay: NonNegative = 0.1
) -> torch.optim.Optimizer:
    """Lion (arXiv:2302.06675): the sign of a momentum, one state per weight; rates are 3 to 10 times below AdamW's.

    The paper's betas of (0.9, 0.99) follow single batches: with small ones, all weights are moved by their noise.
    """
    from pytorch_optimizer import Lion

    return Lion(list(groups), lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay)


def came(
    groups: Groups,
    lr: Positive,
    betas: tuple[Momentum, Momentum, Momentum] = (0.9, 0.999, 0.9999),
    weight_decay: NonNegative = 0.01,
) -> torch.optim.Optimizer:
    """CAME (arXiv:2307.02047): Adafactor's factored moments with a momentum, weighted by its confidence."""
    from pytorch_optimizer import CAME

    return CAME(list(groups), lr=lr, betas=(betas[0], betas[1], betas[2]), weight_decay=weight_decay)


def prodigy(
    groups: Groups,
    lr: Positive = 1.0,
    betas: tuple[Momentum, Momentum] = (0.9, 0.99),
    weight_decay: NonNegative = 0.01,
    d_coef: Positive = 1.0,
    d0: Positive = 1e-6,
) -> torch.optim.Optimizer:
    """Prodigy (arXiv:2306.06101): AdamW that estimates its rate.

    lr: factor on the estimated rate; leave it at 1. d_coef: factor on the estimate, the one to tune. d0: its start.
    """
    from pytorch_optimizer import Prodigy

    return Prodigy(
        list(groups),
        lr=lr,
        betas=(betas[0], betas[1]),
        weight_decay=weight_decay,
        d_coef=d_coef,
        d0=d0,
        bias_correction=True,
        safeguard_warmup=True,
    )


def schedule_free_adamw(
    groups: Groups,
    lr: Positive,
    betas: tuple[Momentum, Momentum] = (0.9, 0.99),
    weight_decay: NonNegative = 0.01,
    warmup_steps: Annotated[int, Ge(0)] = 0,
) -> torch.optim.Optimizer:
    """Schedule-free AdamW (arXiv:2405.15682): an average of the weights takes the place of a schedule.

    Validation, previews and export use the average. Goes with `lr_schedule=constant`; the warm-up is its own.
    """
    from pytorch_optimizer import ScheduleFreeAdamW

    return ScheduleFreeAdamW(
        list(groups), lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, warmup_steps=warmup_steps
    )


def muon(
    groups: Groups,
    lr: Positive,
    momentum: Momentum = 0.95,
    weight_decay: NonNegative = 0.01,
    betas: tuple[Momentum, Momentum] = (0.9, 0.99),
    ns_steps: Count = 5,
) -> torch.optim.Optimizer:
    """Muon: orthogonalised momentum of matrices, with updates as large as AdamW's (arXiv:2502.16982), so that its rates
    fit. A convolution counts as a matrix of its output channels. Norms and biases are trained by AdamW.

    betas: of AdamW. ns_steps: iterations of Newton and Schulz, in bf16 on GPUs and in fp32 on CPUs.
    """
    from sdft.optimizers.muon import Muon

    split: list[dict[str, Any]] = []
    for group in groups:
        for is_matrix in (True, False):
            params = [p for p in group["params"] if (p.ndim > 1) == is_matrix]
            if params:
                kind = {"momentum": momentum} if is_matrix else {"betas": tuple(betas)}
                decay = group.get("weight_decay", weight_decay)
                split.append({**group, "params": params, "use_muon": is_matrix, "weight_decay": decay, **kind})
    return Muon(split, lr=lr, adamw_lr=lr, ns_steps=ns_steps, use_adjusted_lr=True)


def sgd(
    groups: Groups, lr: Positive, momentum: Momentum = 0.9, nesterov: bool = True, weight_decay: NonNegative = 0.0
) -> torch.optim.SGD:
    """Stochastic gradient descent with momentum. Its rate depends on the scale of the gradients: sweep it."""
    kernel: dict[str, Any] = {"fused": True} if on_gpu(groups := list(groups)) else {"foreach": True}
    return torch.optim.SGD(
        groups, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=weight_decay, **kernel
    )


def on_gpu(groups: list[dict[str, Any]]) -> bool:
    """Whether all parameters are on GPUs, so that torch's fused kernels can be used."""
    return all(p.is_cuda for group in groups for p in group["params"])


def bitsandbytes(key: str) -> Any:
    """The package bitsandbytes. Raises UserError if it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"{key}: needs the package bitsandbytes; pip install 'sdft[low_memory]'") from error
    return bitsandbytes


def probe(build: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
    """The optimizer of one small weight, to learn of its kind before there is a model."""
    return build([{"params": [torch.nn.Parameter(torch.zeros(2, 2))], "name": "probe", "lr_scale": 1.0}])


def scale_rates(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Multiply the learning rate of each parameter group by its `lr_scale`; returns the same, new optimizer."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group["lr_scale"]
    return optimizer


def adapts_its_rate(optimizer: torch.optim.Optimizer) -> bool:
    """Whether one step uses the gradients of all parameters, so that they cannot be updated one at a time."""
    return type(optimizer).__name__ in ("Prodigy", "ScheduleFreeProdigy", "DAdaptAdam", "DAdaptLion", "DAdaptSGD")


def averages_weights(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer is schedule-free: it has `train` and `eval` modes, with different weights."""
    return isinstance(getattr(optimizer, "eval", None), Callable)  # type: ignore[arg-type]
