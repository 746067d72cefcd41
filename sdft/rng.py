"""Counter-based randomness: every draw is a pure function of (run seed, purpose, key, counter).

No generator is kept from step to step, so draws do not depend on the number of workers, the batch size, accumulation,
the world size or a resume. Draws are made on the CPU, so that every device gets the same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def seed_of(run_seed: int, purpose: str, key: str = "", counter: int = 0) -> int:
    """A 63-bit seed; different purposes, keys and counters are independent (BLAKE2b of the four)."""
    text = f"{run_seed}\x1f{purpose}\x1f{key}\x1f{counter}"
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest(), "little") >> 1


def generator(run_seed: int, purpose: str, key: str = "", counter: int = 0) -> torch.Generator:
    """A CPU generator seeded by (run seed, purpose, key, counter)."""
    return torch.Generator().manual_seed(seed_of(run_seed, purpose, key, counter))


class Position(NamedTuple):
    """Where in the run a batch is.

    step: optimizer steps before it. first: samples of its own step that come before it, over all devices.
    per_step: samples of its step. progress: share of the run's steps that come before it.
    """

    step: int
    first: int
    per_step: int
    progress: float


class Draws:
    """Random numbers for a batch: those of sample i are seeded by its own key and visit.

    position: of the batch in the run; if None, it counts as the only batch of the first step.
    """

    def __init__(self, run_seed: int, keys: Sequence[str], visits: Sequence[int], position: Position | None = None):
        self.run_seed, self.keys, self.visits = run_seed, keys, visits
        self.position = position or Position(0, 0, len(keys), 0.0)

    def samples(self) -> Iterator[Draws]:
        """The draws of each sample by itself."""
        pairs = zip(self.keys, self.visits, strict=True)
        return (Draws(self.run_seed, [key], [visit], self.position) for key, visit in pairs)

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, B x shape, fp32."""
        return self._stack(purpose, lambda g: torch.randn(tuple(shape), generator=g))

    def uniform(self, purpose: str) -> Tensor:
        """One number in [0, 1) per sample, fp64."""
        return self._stack(purpose, lambda g: torch.rand((), generator=g, dtype=torch.float64))

    def stratified(self, purpose: str) -> Tensor:
        """One number in [0, 1) per sample, fp64, spread evenly over the N samples of the optimizer step: sample i has
        u + i / N modulo 1, where u is seeded by the step (Kingma et al., arXiv:2107.00630, appendix I.1).

        Each is uniform by itself. They depend on the samples' places in the step, and not on how it is split.
        """
        g = generator(self.run_seed, f"{purpose} of a step", counter=self.position.step)
        places = self.position.first + torch.arange(len(self.keys), dtype=torch.float64)
        return (torch.rand((), generator=g, dtype=torch.float64) + places / self.position.per_step) % 1

    def _stack(self, purpose: str, draw) -> Tensor:
        streams = zip(self.keys, self.visits, strict=True)
        return torch.stack([draw(generator(self.run_seed, purpose, key, visit)) for key, visit in streams])
