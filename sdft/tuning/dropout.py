"""Dropout whose mask of a sample is a pure function of (run seed, sample, visit, layer).

`torch.nn.Dropout` draws one mask for a whole batch from a stateful generator: a sample's mask then depends on the batch
it is in. Here each element of the mask is a hash of the sample's seed, the layer and the element's position, computed
on the device of the input. Batch size, accumulation, world size, resuming and the recomputation of gradient
checkpointing do not change it, and neither does the kind of device.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from sdft.hardware import send
from sdft.rng import Draws, seed_of

LOW = 2**32 - 1
MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35)


class SampleSeeds:
    """The seeds of the samples of the current batch, shared by all dropout layers of a model.

    words_2B: the low and high 32 bits of each sample's seed, int32; None before the first batch.
    """

    words_2B: Tensor | None = None

    def set(self, draws: Draws, device: torch.device) -> None:
        """Seed the masks by the samples of a batch."""
        samples = zip(draws.keys, draws.visits, strict=True)
        seeds = [seed_of(draws.run_seed, "dropout", key, visit) for key, visit in samples]
        words = [[signed(seed & LOW) for seed in seeds], [signed(seed >> 32) for seed in seeds]]
        self.words_2B = send(torch.tensor(words, dtype=torch.int32), device)


class SampleDropout(nn.Module):
    """In training, zeros elements with probability `p` and scales the others by 1 / (1 - p), like `torch.nn.Dropout`.

    p: in [0, 1).
    layer: name of the layer; layers of different names get independent masks.
    seeds: of the current batch.

    The first dimension of the input is that of the batch, or a multiple of it with the rows of a sample together. A
    layer that is called twice in a step uses the same mask twice.
    """

    PURPOSE: ClassVar[str] = "dropout layer"

    def __init__(self, p: float, layer: str, seeds: SampleSeeds):
        super().__init__()
        self.p, self.seeds = p, seeds
        salt = seed_of(0, self.PURPOSE, layer)
        self._salts = signed(salt & LOW), signed(salt >> 32)
        self._threshold = round(p * 2**32) - 2**31

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        dropped = self._dropped(x, x.numel())
        return x.masked_fill(dropped.view(x.shape), 0) * (1 / (1 - self.p))

    def _dropped(self, x: Tensor, num: int) -> Tensor:
        """Whether each of `num` numbers, equally many of each sample, is dropped: B x numbers of a sample."""
        words_2B = self.seeds.words_2B
        if words_2B is None or x.shape[0] % words_2B.shape[1]:
            known = 0 if words_2B is None else words_2B.shape[1]
            raise RuntimeError(f"dropout: {len(x)} rows, but seeds of {known} samples; call Tuning.seed_dropout first")
        low_B1, high_B1 = (words_B[:, None] ^ salt for words_B, salt in zip(words_2B, self._salts, strict=True))
        position = torch.arange(num // len(low_B1), dtype=torch.int32, device=x.device)
        return mix(mix(position ^ low_B1).bitwise_xor_(high_B1)) < self._threshold

    def _by_row(self, x: Tensor, num: int) -> Tensor:
        """`num` decisions for each sample, repeated for each of its rows: rows x num."""
        num_samples = 0 if self.seeds.words_2B is None else self.seeds.words_2B.shape[1]
        dropped_BN = self._dropped(x, num * num_samples)
        return dropped_BN.repeat_interleave(len(x) // num_samples, dim=0)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class RankDropout(SampleDropout):
    """In training, drops each rank of an adapter for a whole sample with probability `p`; the others are scaled by
    1 / (1 - p). Its input is what the lower factor gives: ... x rank, or of a convolution B x rank x H x W.
    """

    PURPOSE = "rank dropout layer"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        place = 1 if x.dim() == 4 else x.dim() - 1
        dropped = self._by_row(x, x.shape[place])
        shape = [len(x) if i == 0 else x.shape[i] if i == place else 1 for i in range(x.dim())]
        return x.masked_fill(dropped.view(shape), 0) * (1 / (1 - self.p))


class ModuleDropout(SampleDropout):
    """In training, drops a whole adapter for a sample with probability `p`; the others are not scaled.

    Its input is that of the adapter, which is linear without a bias: of zeros it makes zeros.
    """

    PURPOSE = "module dropout layer"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x.masked_fill(self._by_row(x, 1).view(-1, *[1] * (x.dim() - 1)), 0)


def mix(h: Tensor) -> Tensor:
    """The 32-bit finalizer of MurmurHash3 (A. Appleby), in place: every bit of int32 `h` affects every bit of it."""
    for shift, multiplier in zip((16, 13), MULTIPLIERS, strict=True):
        h.bitwise_xor_(h.bitwise_right_shift(shift).bitwise_and_((1 << 32 - shift) - 1)).mul_(signed(multiplier))
    return h.bitwise_xor_(h.bitwise_right_shift(16).bitwise_and_(0xFFFF))


def signed(word: int) -> int:
    """The int32 with the bits of an unsigned 32-bit word."""
    return word - 2**32 if word >= 2**31 else word
