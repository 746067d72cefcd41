"""What a training step exchanges: the batch, the conditioning of the model, and the loss that comes back.

Shape suffixes used throughout: B batch, C channels, H and W height and width (always in this order), L tokens,
D context width, P pooled width, E text encoders, N any number. Sizes are `(h, w)` in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor


@dataclass
class Batch:
    """What one step learns from. Everything random about a sample follows from its key and visit (see `rng`)."""

    keys: Sequence[str]
    """Stable name of each sample: a relative path, a shard entry, `toy/dreamy/train/17`."""
    visits: Sequence[int]
    """How often the run has seen each sample before: the epoch of a fixed-size source."""
    captions: Sequence[str]
    """Captions as the text encoders read them; dropped ones are marked in `dropped`."""
    dropped_B: Tensor
    """bool: the caption is replaced by the empty conditioning."""
    time_ids_B6: Tensor
    """fp32: original h, w, crop top, left, target h, w."""
    loss_weight_B: Tensor
    """fp32 weight of each sample, 1 unless a source says otherwise."""
    pixels_BCHW: Tensor | None = None
    """fp32 in [-1, 1]; None when the latents are cached."""
    moments_BCHW: Tensor | None = None
    """fp32 posterior mean and log variance, stacked on C; None when not cached."""
    context_BLD: Tensor | None = None
    pooled_BP: Tensor | None = None
    """Text states of the captions, of the empty string where dropped; None when the encoders read them anew."""
    dropped_BE: Tensor | None = None
    """bool: text encoders that see the empty conditioning while the other reads on; None where none ever does."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def dropped_by_encoder_BE(self) -> Tensor:
        """bool: which text encoders see the empty conditioning; E is 1 where that is always all or none of them."""
        all_B1 = self.dropped_B[:, None]
        return all_B1 if self.dropped_BE is None else all_B1 | self.dropped_BE

    def to(self, device: Any) -> Batch:
        """The same batch with its tensors on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


@dataclass
class Conditioning:
    """What the UNet is told besides the noisy latents."""

    context_BLD: Tensor
    pooled_BP: Tensor
    time_ids_B6: Tensor
    """fp32 whatever the model computes in: bf16 cannot hold a size of 683."""


@dataclass
class LossReport:
    """One loss a sample, and the figures worth watching."""

    per_sample_B: Tensor
    figures: dict[str, Tensor] = field(default_factory=dict)

    def scalars(self, prefix: str) -> dict[str, Tensor]:
        """Everything to log, detached: the mean loss and the mean of each figure."""
        named = {"loss": self.per_sample_B, **self.figures}
        return {f"{prefix}/{name}": value.detach().float().mean() for name, value in named.items()}
