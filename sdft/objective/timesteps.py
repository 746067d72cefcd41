"""Timestep distributions: from uniform numbers to the timesteps that are trained."""

from __future__ import annotations

import torch
from torch import Tensor

from sdft.errors import UserError
from sdft.objective.noise_schedule import NUM_TIMESTEPS
from sdft.types import Fraction, Positive


class UniformTimesteps:
    """Timesteps spread evenly over [low, high) of the schedule, as fractions of its length."""

    def __init__(self, low: Fraction = 0.0, high: Fraction = 1.0):
        if low >= high:
            raise UserError(f"objective.timesteps: low={low} must be below high={high}")
        self.low, self.high = low, high

    def __call__(self, u_B: Tensor) -> Tensor:
        """Timesteps of uniform numbers in [0, 1)."""
        return ((self.low + (self.high - self.low) * u_B) * NUM_TIMESTEPS).long()


class LogitNormalTimesteps:
    """Timesteps whose logit is normal: more training where `mean` says, in units of the schedule's logit."""

    def __init__(self, mean: float = 0.0, std: Positive = 1.0):
        self.mean, self.std = mean, std

    def __call__(self, u_B: Tensor) -> Tensor:
        """Timesteps of uniform numbers in [0, 1)."""
        normal = torch.special.ndtri(u_B.clamp(1e-9, 1 - 1e-9))
        return (torch.sigmoid(self.mean + self.std * normal) * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)
