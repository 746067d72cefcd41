"""Loss weightings as functions of the signal-to-noise ratio (SNR), or of the timestep."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sdft.errors import UserError
from sdft.objective.prediction import weight_for_eps, weight_for_z0
from sdft.protocols import Prediction, Weighting
from sdft.types import NonNegative, Positive


class Uniform(Weighting):
    """Weight 1 at every timestep."""

    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        return torch.ones_like(snr)


class MinSNR(Weighting):
    """min(SNR, gamma) as the weight of the error in z0 (Hang et al., arXiv:2303.09556).

    gamma: the SNR above which the weight stops growing; 5 in the paper.
    """

    def __init__(self, gamma: Positive = 5.0):
        self.gamma = gamma

    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        return weight_for_z0(snr.clamp(max=self.gamma), snr, prediction)


class SoftMinSNR(Weighting):
    """SNR gamma / (SNR + gamma) as the weight of the error in z0: min-SNR without its bend (Crowson et al.,
    arXiv:2401.11605, section 3.2).

    gamma: 4 in the paper.
    """

    def __init__(self, gamma: Positive = 4.0):
        self.gamma = gamma

    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        return weight_for_z0(snr * self.gamma / (snr + self.gamma), snr, prediction)


class Debiased(Weighting):
    """1 / sqrt(SNR), with the SNR capped at 1000 (Yu et al., arXiv:2310.08442); defined for epsilon only."""

    predictions = ("epsilon",)

    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        return snr.clamp(max=1000).rsqrt()


class P2(Weighting):
    """1 / (k + SNR)^gamma as the weight of the error in eps: less where only invisible detail is left to learn
    (Choi et al., arXiv:2204.00227, equation 8).

    gamma: 0 is uniform; 0.5 and 1 in the paper. k: 1 in the paper.
    """

    def __init__(self, gamma: NonNegative = 1.0, k: Positive = 1.0):
        self.gamma, self.k = gamma, k

    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        return weight_for_eps((self.k + snr) ** -self.gamma, snr, prediction)


class SNRInverse(Weighting):
    """min(1 / SNR, cap) as the weight of the squared error in eps, which makes it that in z0, up to the
    cap.

    cap: 20 is reached at timestep 771 of SDXL.
    """

    def __init__(self, cap: Positive = 20.0):
        self.cap = cap

    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        return weight_for_eps((1 / snr).clamp(max=self.cap), snr, prediction)


class Curve(Weighting):
    """A curve of your own: weights of the error of the prediction, in straight lines between points.

    points: (share of the schedule, weight), from low noise at 0 to high noise at 1; before the first point and after
        the last, their weights hold.

    Raises UserError for points out of order, shares outside of 0 to 1, and negative weights.
    """

    def __init__(self, points: Sequence[tuple[float, float]]):
        shares, weights = zip(*points, strict=True) if points else ((), ())
        if not points or list(shares) != sorted(set(shares)) or min(shares) < 0 or max(shares) > 1 or min(weights) < 0:
            raise UserError(
                f"objective.weighting.points={[list(point) for point in points]}: give [share, weight] pairs with "
                "shares that rise from 0 to 1 and weights of at least 0, such as [[0, 1], [1, 0.5]]"
            )
        self.shares, self.weights = shares, weights

    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        raise NotImplementedError("a curve over timesteps; call at_time")

    def at_time(self, time: Tensor, snr: Tensor, prediction: Prediction) -> Tensor:
        return torch.from_numpy(np.interp(time.cpu().numpy(), self.shares, self.weights)).to(snr)
