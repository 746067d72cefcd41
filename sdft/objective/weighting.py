"""Loss weightings as functions of the signal-to-noise ratio (SNR)."""

from __future__ import annotations

import torch
from torch import Tensor

from sdft.protocols import Prediction, Weighting
from sdft.types import Positive


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
        clipped = snr.clamp(max=self.gamma)
        return clipped / snr if prediction == "epsilon" else clipped / (snr + 1)


class Debiased(Weighting):
    """1 / sqrt(SNR), with the SNR capped at 1000 (Yu et al., arXiv:2310.08442); defined for epsilon only."""

    predictions = ("epsilon",)

    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        return snr.clamp(max=1000).rsqrt()
