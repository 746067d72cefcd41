"""What a training step exchanges: the batch, the conditioning of the model, and the loss that comes back.

Shape suffixes used throughout: B batch, C channels, H and W height and width (always in this order), L tokens,
D context width, P pooled width, E text encoders, N any number. Sizes are `(h, w)` in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from sdft.hardware import send

REJECTED = ("rejected_time_ids_B6", "rejected_pixels_BCHW", "rejected_moments_BCHW")
"""The columns of rejected pictures."""


@dataclass
class Batch:
    """The samples of one step. All randomness about a sample follows from its key and visit (see `sdft.rng`)."""

    keys: Sequence[str]
    """Unique, stable name of each sample: a relative path, a shard entry, `toy/dreamy/train/17`."""
    visits: Sequence[int]
    """How often the run has drawn each sample before, at any size: the epoch, for a run of one size."""
    captions: Sequence[str]
    """Captions; those marked in `dropped` are not encoded."""
    dropped_B: Tensor
    """bool: the caption is replaced by the empty prompt."""
    time_ids_B6: Tensor
    """fp32: original h, w, crop top, left, target h, w."""
    loss_weight_B: Tensor
    """fp32 weight of each sample's loss, 1 by default."""
    pixels_BCHW: Tensor | None = None
    """fp32 in [-1, 1]; None when the latents are cached."""
    moments_BCHW: Tensor | None = None
    """fp32 mean and log variance of the VAE's posterior, stacked on C; None when not cached."""
    context_BLD: Tensor | None = None
    pooled_BP: Tensor | None = None
    """Cached text embeddings, of the empty string where dropped; None when the encoders run in the step."""
    mask_B1HW: Tensor | None = None
    """fp32 in [0, 1], at the size of the pixels: how much of the loss counts where; None without masks."""
    dropped_BE: Tensor | None = None
    """bool: text encoders for which alone the caption is dropped; None if that is never the case."""
    rejected_time_ids_B6: Tensor | None = None
    rejected_pixels_BCHW: Tensor | None = None
    rejected_moments_BCHW: Tensor | None = None
    """Of the other picture of each pair, which was not preferred; None without pairs."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def dropped_by_encoder_BE(self) -> Tensor:
        """bool: for which text encoders the caption is dropped; E is 1 if always for all or none."""
        all_B1 = self.dropped_B[:, None]
        return all_B1 if self.dropped_BE is None else all_B1 | self.dropped_BE

    @property
    def rejected(self) -> Batch | None:
        """The batch of the rejected pictures, with the same keys and captions; None without pairs."""
        if self.rejected_time_ids_B6 is None:
            return None
        return replace(
            self,
            time_ids_B6=self.rejected_time_ids_B6,
            pixels_BCHW=self.rejected_pixels_BCHW,
            moments_BCHW=self.rejected_moments_BCHW,
            rejected_time_ids_B6=None,
            rejected_pixels_BCHW=None,
            rejected_moments_BCHW=None,
        )

    def to(self, device: Any) -> Batch:
        """The same batch with its tensors on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **{name: send(tensor, device) for name, tensor in tensors.items()})


@dataclass
class Conditioning:
    """The conditioning of the denoiser: text embeddings and SDXL's size embedding."""

    context_BLD: Tensor
    pooled_BP: Tensor
    time_ids_B6: Tensor
    """fp32 in every precision: bf16 cannot represent a size of 683."""


@dataclass
class LossReport:
    """The loss of each sample, and further values to log."""

    per_sample_B: Tensor
    figures: dict[str, Tensor] = field(default_factory=dict)
    time_B: Tensor | None = None
    """On the CPU: the timestep of each sample as a share of the schedule, 0 for no noise; None without timesteps."""

    def scalars(self, prefix: str) -> dict[str, Tensor]:
        """The mean loss and the mean of each value, detached, for logging."""
        named = {"loss": self.per_sample_B, **self.figures}
        return {f"{prefix}/{name}": value.detach().float().mean() for name, value in named.items()}
