"""Loss weightings as functions of the signal-to-noise ratio (SNR)."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from sdft.types import Positive

Prediction = Literal["epsilon", "v_prediction"]


class Weighting(Protocol):
    """The weight of a sample's squared error, given its SNR (fp64)."""

    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor: ...


class Uniform:
    """Every noise level counts the same."""

    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        return torch.ones_like(snr)


class MinSNR:
    """min(SNR, gamma) as the weight of the error in z0 (Hang et al., arXiv:2303.09556).

    gamma: where the weight stops growing; 5 in the paper.
    """

    def __init__(self, gamma: Positive = 5.0):
        self.gamma = gamma

    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        clipped = snr.clamp(max=self.gamma)
        return clipped / snr if prediction == "epsilon" else clipped / (snr + 1)


class Debiased:
    """1 / sqrt(SNR), with the SNR capped at 1000 (Yu et al., arXiv:2310.08442); epsilon only."""

    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        return snr.clamp(max=1000).rsqrt()
