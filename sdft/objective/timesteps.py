"""Timestep distributions: each maps uniform numbers to timesteps, so that the draws stay the samples' own."""

from __future__ import annotations

import torch
from torch import Tensor

from sdft.errors import UserError
from sdft.types import Fraction, Positive


class UniformTimesteps:
    """Uniform over [low, high) of the schedule, as fractions of its length."""

    def __init__(self, low: Fraction = 0.0, high: Fraction = 1.0):
        if low >= high:
            raise UserError(f"objective.timesteps: low={low} must be below high={high}")
        self.low, self.high = low, high

    def __call__(self, u_B: Tensor, num_timesteps: int = 1000) -> Tensor:
        return ((self.low + (self.high - self.low) * u_B) * num_timesteps).long()


class CubicTimesteps:
    """(1 - u^3) of the schedule for u uniform: more at high noise, where composition is decided (Mou et al.,
    arXiv:2302.08453, section 3.4)."""

    def __call__(self, u_B: Tensor, num_timesteps: int = 1000) -> Tensor:
        return ((1 - u_B**3) * num_timesteps).long().clamp(max=num_timesteps - 1)


class LogitNormalTimesteps:
    """Logit-normal over the schedule (Esser et al., arXiv:2403.03206, section 3.1).

    mean, std: of the logit of t / num_timesteps; a negative mean trains more at low noise.
    """

    def __init__(self, mean: float = 0.0, std: Positive = 1.0):
        self.mean, self.std = mean, std

    def __call__(self, u_B: Tensor, num_timesteps: int = 1000) -> Tensor:
        normal = torch.special.ndtri(u_B.clamp(1e-9, 1 - 1e-9))
        return (torch.sigmoid(self.mean + self.std * normal) * num_timesteps).long().clamp(max=num_timesteps - 1)
