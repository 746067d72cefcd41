"""Values of a GPU that the host reads a step later, so that it never waits for the step that it has just launched."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class LaggedTensor:
    """A copy of a tensor on its way to the host, as fp32.

    On a GPU, the copy is queued behind what computes the tensor. `read` waits for it: a step later it has arrived.
    """

    def __init__(self, value: Tensor):
        self._copied: torch.cuda.Event | None = None
        value = value.detach().float()
        if not value.is_cuda:
            self._host = value.clone()
            return
        self._host = torch.empty(value.shape, pin_memory=True)
        self._host.copy_(value, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def values(self) -> np.ndarray:
        """The values. Not `tolist`, which would wait for all that is queued."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.numpy()


class LaggedScalar(LaggedTensor):
    """A copy of a scalar on its way to the host."""

    def read(self) -> float:
        """The value. Not `item`, which would wait for all that is queued."""
        return float(self.values())
