"""Muon of pytorch-optimizer, in fp32 on CPUs.

Most CPUs multiply bf16 matrices about ten times slower than fp32 ones; those with units for it round them otherwise.
"""

from __future__ import annotations

from typing import Any

import pytorch_optimizer
import torch
from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_newton_schulz_5
from torch import Tensor


class Muon(pytorch_optimizer.Muon):
    """The class of pytorch-optimizer; on CPUs, momentum is made orthogonal in fp32."""

    @staticmethod
    def _orthogonalize(group: dict[str, Any], updates: list[Tensor]) -> list[Tensor]:
        if any(update.device.type != "cpu" for update in updates):
            return pytorch_optimizer.Muon._orthogonalize(group, updates)
        steps, weights = group["ns_steps"], group["ns_coeffs"]
        return [
            zero_power_via_newton_schulz_5(update.float().flatten(1), steps, weights=weights, dtype=torch.float32)
            for update in updates
        ]
