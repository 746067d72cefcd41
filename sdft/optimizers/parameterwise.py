"""Updates one parameter at a time: weights in bf16 learn, and gradients are freed during the backward pass.

Both are independent of the optimizer, and need that it updates each parameter by its own gradient only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sdft.errors import UserError
from sdft.optimizers.optimizers import Groups, adapts_its_rate, averages_weights
from sdft.rng import seed_of

MANTISSA_BITS = 16
"""Bits of fp32 that bf16 lacks."""


class ParameterwiseOptimizer(torch.optim.Optimizer):
    """Steps an optimizer one parameter at a time.

    A parameter in bf16 is cast to fp32 together with its gradient, updated, and rounded back stochastically: up or down
    with probabilities that make the rounding unbiased, so that updates below bf16's resolution are not lost
    (arXiv:2010.06192). No fp32 copy of the weights is kept. The noise is seeded by the run's seed, the parameter and
    its number of updates.

    build: makes the optimizer from parameter groups. groups: they are split into one per parameter.
    seed: of the run.
    in_backward: update each parameter as soon as its gradient is complete, and free the gradient (arXiv:2306.09782).
        `step` then only runs its closure.
    max_norm: the gradient of each parameter is scaled down to this L2 norm, if `in_backward`: the norm over all of them
        is known only after the backward pass. 0: no clipping.

    Raises UserError for an optimizer that needs all gradients at once.
    """

    def __init__(
        self,
        build: Callable[[Groups], torch.optim.Optimizer],
        groups: Groups,
        seed: int,
        in_backward: bool = False,
        max_norm: float = 0.0,
    ):
        single = [{**group, "params": [p], "num_updates": 0} for group in groups for p in group["params"]]
        self.inner = build(single)
        if adapts_its_rate(self.inner) or averages_weights(self.inner):
            raise UserError(
                f"optimizer: {type(self.inner).__name__} needs all gradients, or the weights in fp32, at once; weights "
                "in bf16 or with fused_backward=true are updated singly; choose optimizer=adamw_8bit or adafactor"
            )
        super().__init__(self.inner.param_groups, self.inner.defaults)
        self.seed, self.in_backward, self.max_norm = seed, in_backward, max_norm
        self._share_state()
        self._squared_norms: list[Tensor] = []
        if in_backward:
            for number, group in enumerate(self.param_groups):
                group["params"][0].register_post_accumulate_grad_hook(self._hook(number))

    def _share_state(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def _hook(self, number: int) -> Callable[[Tensor], None]:
        def update(_: Tensor) -> None:
            self._update(number)

        return update

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        self._squared_norms.clear()
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.in_backward:
            for number in range(len(self.param_groups)):
                self._update(number)
        return loss

    @torch.no_grad()
    def _update(self, number: int) -> None:
        """Update one parameter, and drop its gradient if that is done in the backward pass."""
        group = self.param_groups[number]
        (parameter,) = group["params"]
        if parameter.grad is None:
            return
        if self.in_backward:
            size = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
            self._squared_norms.append(size.square())
            if self.max_norm:
                parameter.grad.mul_((self.max_norm / (size + 1e-6)).clamp(max=1.0))
        low_precision = parameter.dtype == torch.bfloat16
        if low_precision:
            weight, gradient = parameter.data, parameter.grad.float()
            parameter.grad = None
            parameter.data = weight.float()
            parameter.grad = gradient
        self._step_one(group)
        if low_precision:
            noise = torch.Generator(parameter.device)
            noise.manual_seed(seed_of(self.seed, "rounding", str(number), group["num_updates"]))
            parameter.grad = None
            weight.copy_(round_stochastically(parameter.data, noise))
            parameter.data = weight  # the same memory, which others may point to
        group["num_updates"] += 1
        if self.in_backward:
            parameter.grad = None

    def _step_one(self, group: dict[str, Any]) -> None:
        """A step of the optimizer with one of its groups."""
        every = self.inner.param_groups
        self.inner.param_groups = [group]
        try:
            self.inner.step()
        finally:
            self.inner.param_groups = every

    def gradient_norm(self) -> Tensor:
        """L2 norm of the gradients of the last backward pass before clipping, if they are freed there."""
        # Those of weights on the host join the others, so that nobody waits for the device.
        device = max((norm.device for norm in self._squared_norms), key=lambda device: device.type != "cpu")
        return torch.stack([norm.to(device, non_blocking=True) for norm in self._squared_norms]).sum().sqrt()

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Also restores states that are wider than their parameter, which torch would cast to its dtype."""
        self.inner.load_state_dict(dict(state_dict))
        self._share_state()
        for number, group in enumerate(self.param_groups):
            (parameter,) = group["params"]
            for name, saved in state_dict["state"].get(number, {}).items():
                if isinstance(saved, Tensor) and self.state[parameter][name].dtype != saved.dtype:
                    self.state[parameter][name] = saved.to(self.state[parameter][name].device)


def round_stochastically(x: Tensor, noise: torch.Generator) -> Tensor:
    """fp32 as bf16, rounded to one of the two neighbours with probabilities that leave the mean as it is."""
    bits = x.view(torch.int32)
    added = torch.randint(0, 1 << MANTISSA_BITS, bits.shape, dtype=torch.int32, device=x.device, generator=noise)
    rounded = ((bits + added) & (-1 << MANTISSA_BITS)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def refuse_fused_backward(trainer: Any) -> None:
    """Raise UserError where a gradient is not complete when the backward pass has reached its parameter."""
    problem = None
    if trainer.accumulate_grad_batches > 1:
        problem = (
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: gradients of several batches cannot "
            "be added up if each is freed at once; set it to 1, and data.batch_size higher"
        )
    elif trainer.world_size > 1:
        problem = "several devices average their gradients after the backward pass; set trainer.devices=1"
    elif trainer.precision == "16-mixed":
        problem = "fp16 scales the loss, and gradients are only sound after the backward pass; use bf16-mixed"
    if problem:
        raise UserError(f"fused_backward=true: {problem}, or set fused_backward=false")
