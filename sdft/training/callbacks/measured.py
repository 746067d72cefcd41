"""What a run measures of its own training: rates, memory, time of a step, and the loss by timestep."""

from __future__ import annotations

import resource
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdft.training.lagged import LaggedTensor

BINS = 5
"""Of timesteps, each of them a fifth of the schedule."""
GIB = 2**30
WINDOW = 50
"""Steps of which the time is the median."""


class Launched(NamedTuple):
    """Losses on their way to the host, with the step at which they were launched and the bin of each."""

    step: int
    losses: LaggedTensor
    bins: np.ndarray


class Measured:
    """Collects values of the steps since they were last asked for. Never waits for a GPU.

    groups: the parameter groups of the optimizer.
    """

    def __init__(self) -> None:
        self.groups: Sequence[Mapping[str, Any]] = ()
        self._losses: list[Tensor] = []
        self._times: list[Tensor] = []
        self._launched: list[Launched] = []
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._step, self._at = -1, time.perf_counter()

    def start(self) -> None:
        """Training starts now."""
        self._at = time.perf_counter()

    def batch(self, latest: Any, step: int) -> None:
        """A batch was trained; `step` optimizer steps are done. latest: of the module."""
        if latest.time_B is not None:
            self._losses.append(latest.loss_B)
            self._times.append(latest.time_B)
        if step != self._step:
            now = time.perf_counter()
            self._seconds.append(now - self._at)
            self._step, self._at = step, now

    def now(self) -> dict[str, float]:
        """Learning rate of each part, median time of the latest steps, and memory."""
        found = {f"rate/{name}": rate for name, rate in rates(self.groups).items()}
        if self._seconds:
            found["speed/seconds"] = median(self._seconds)
        return found | memory()

    def losses_by_timestep(self, step: int, last: bool = False) -> Iterator[tuple[int, dict[str, float]]]:
        """(step, mean loss of each bin of timesteps) of the batches since the last call, on a GPU of the call before.

        step: optimizer steps done. last: also those that are on their way.
        """
        if self._losses:
            losses, times = LaggedTensor(torch.cat(self._losses)), torch.cat(self._times)
            bins = np.minimum((times.numpy() * BINS).astype(int), BINS - 1)
            self._launched.append(Launched(step, losses, bins))
            waits = self._losses[0].is_cuda and not last
            self._losses, self._times = [], []
        else:
            waits = not last
        due = len(self._launched) - waits
        done, self._launched = self._launched[:due], self._launched[due:]
        for launched in done:
            values = launched.losses.values()
            yield (
                launched.step,
                {
                    f"timestep/{1000 * number // BINS}": float(values[launched.bins == number].mean())
                    for number in np.unique(launched.bins)
                },
            )


def rates(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The learning rate of each part; of optimizers that estimate a factor of it, such as Prodigy, the product."""
    found: dict[str, float] = {}
    for number, group in enumerate(groups):
        found.setdefault(str(group.get("name", number)), float(group["lr"]) * float(group.get("d", 1.0)))
    return found


def memory() -> dict[str, float]:
    """GiB that the process holds now and held at most: of the GPU if it has one, else of the machine."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        now, most = torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
    else:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        now = resident() or most
    return {"memory/now": now / GIB, "memory/most": max(now, most) / GIB}


def resident() -> int | None:
    """Bytes of this process in the memory of the machine; None where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return None
