"""Scalars of a GPU that the host reads a step later, so that it never waits for the step that it has just launched."""

from __future__ import annotations

import torch
from torch import Tensor


class LaggedScalar:
    """A copy of a scalar on its way to the host.

    On a GPU, the copy is queued behind what computes the scalar. `read` waits for it: a step later it has arrived.
    """

    def __init__(self, value: Tensor):
        self._copied: torch.cuda.Event | None = None
        value = value.detach().float()
        if not value.is_cuda:
            self._host = value.clone()
            return
        self._host = torch.empty((), pin_memory=True)
        self._host.copy_(value, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def read(self) -> float:
        """The value. Not `item`, which would wait for all that is queued."""
        if self._copied is not None:
            self._copied.synchronize()
        return float(self._host.numpy())
