"""Losses: the error of each element of a prediction. All are near the squared error where it is small."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sdft.types import Positive


class L2:
    """The squared error."""

    def __call__(self, prediction: Tensor, target: Tensor, snr_B: Tensor, time_B: Tensor) -> Tensor:
        return (prediction - target).square()


class Huber:
    """The pseudo-Huber loss 2 c (sqrt(d^2 + c^2) - c) of an error d: d^2 where it is well below c, and 2 c |d| well
    above, so that outliers such as a wrong picture count less (Khrapov et al., arXiv:2403.16728).

    c: where the loss goes from square to linear. schedule: `constant`; or larger than c at low noise, where errors are
        of detail: `exponential`, c^(t / T), which is 1 at t = 0 and c at the end; `snr`, c + (1 - c) / (1 + s / a)^2,
        which is near 1 at low noise and near c at high.
    """

    def __init__(self, c: Positive = 0.1, schedule: Literal["constant", "snr", "exponential"] = "snr"):
        self.c, self.schedule = c, schedule

    def __call__(self, prediction: Tensor, target: Tensor, snr_B: Tensor, time_B: Tensor) -> Tensor:
        c = self.c_at(snr_B, time_B).to(prediction)[:, None, None, None]
        return 2 * c * ((prediction - target).square().add(c.square()).sqrt() - c)

    def c_at(self, snr_B: Tensor, time_B: Tensor) -> Tensor:
        """c of each sample, fp64. snr_B: signal-to-noise ratio. time_B: share of the schedule, in [0, 1)."""
        if self.schedule == "exponential":
            return self.c**time_B
        if self.schedule == "snr":
            return self.c + (1 - self.c) / (1 + snr_B.rsqrt()).square()
        return torch.full_like(snr_B, self.c)


class SmoothL1(Huber):
    """2 (sqrt(d^2 + c^2) - c) of an error d: 2 |d| well above c, d^2 / c well below.

    c, schedule: as in `Huber`, from which it differs by the factor 1 / c.
    """

    def __call__(self, prediction: Tensor, target: Tensor, snr_B: Tensor, time_B: Tensor) -> Tensor:
        c = self.c_at(snr_B, time_B).to(prediction)[:, None, None, None]
        return super().__call__(prediction, target, snr_B, time_B) / c
