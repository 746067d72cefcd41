"""Noise: what is added to clean latents. Every number of a sample is seeded by its key and visit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sdft.errors import UserError
from sdft.hardware import send
from sdft.rng import Draws
from sdft.types import Count, Fraction, Positive


class Gaussian:
    """Independent standard normal numbers."""

    def __call__(self, draws: Draws, z0_BCHW: Tensor) -> Tensor:
        return send(draws.normal("noise", z0_BCHW.shape[1:]), z0_BCHW.device).to(z0_BCHW.dtype)


class Offset(Gaussian):
    """Gaussian noise plus one normal number per channel, times `strength`, so that the mean of a picture is learned:
    for very dark and very bright pictures (N. Guttenberg, "Diffusion with offset noise", 2023).

    strength: 0.0357 trained the base SDXL.
    random: a strength for each visit, uniform between 0 and `strength`.
    adaptive: this times the absolute mean of the channel of z0 is added to the strength, which is then at least 0.

    Raises UserError for a strength of 0 without `adaptive`, which is no offset.
    """

    def __init__(self, strength: float = 0.05, random: bool = False, adaptive: float = 0.0):
        if strength < 0 or (strength == 0 and not adaptive):
            raise UserError(f"objective.noise.strength={strength}: must be above 0; objective/noise=gaussian has none")
        self.strength, self.random, self.adaptive = strength, random, adaptive

    def __call__(self, draws: Draws, z0_BCHW: Tensor) -> Tensor:
        strength_B = torch.full((len(z0_BCHW),), self.strength, dtype=torch.float64)
        if self.random:
            strength_B = strength_B * draws.uniform("offset strength")
        strength_BC11 = send(strength_B.float(), z0_BCHW.device).to(z0_BCHW.dtype)[:, None, None, None]
        if self.adaptive:
            level_BC11 = z0_BCHW.mean(dim=(2, 3), keepdim=True).abs()
            strength_BC11 = (strength_BC11 + self.adaptive * level_BC11).clamp_min(0)
        offset_BC11 = send(draws.normal("offset", (z0_BCHW.shape[1], 1, 1)), z0_BCHW.device).to(z0_BCHW.dtype)
        return super().__call__(draws, z0_BCHW) + strength_BC11 * offset_BC11


class Pyramid:
    """Gaussian noise plus noise of ever lower resolutions, enlarged: a stronger form of `Offset`
    (J. Whitaker, "Multi-resolution noise for diffusion model training", 2023).

    levels: at most so many; level i, from 0, is smaller by r^i with r uniform in [2, 4) for each visit and level, and
        the first with a side of 1 is the last. discount: level i is multiplied by this to the power i.

    The sum is divided by its standard deviation over the sample.
    """

    def __init__(self, levels: Count = 6, discount: Fraction = 0.3):
        self.levels, self.discount = levels, discount

    def __call__(self, draws: Draws, z0_BCHW: Tensor) -> Tensor:
        eps_BCHW = draws.normal("noise", z0_BCHW.shape[1:])
        ratios_BN = torch.stack([draws.uniform(f"pyramid ratio {i}") for i in range(self.levels)], dim=1)
        for b, (ratios_N, sample) in enumerate(zip(ratios_BN.tolist(), draws.samples(), strict=True)):
            eps_BCHW[b] = self._of_sample(eps_BCHW[b], ratios_N, sample)
        return send(eps_BCHW, z0_BCHW.device).to(z0_BCHW.dtype)

    def _of_sample(self, eps_CHW: Tensor, ratios_N: list[float], sample: Draws) -> Tensor:
        channels, height, width = eps_CHW.shape
        total = eps_CHW
        for i, u in enumerate(ratios_N):
            h, w = (max(1, int(side / (2 + 2 * u) ** i)) for side in (height, width))
            coarse_1CHW = sample.normal(f"pyramid level {i}", (channels, h, w))
            enlarged = F.interpolate(coarse_1CHW, (height, width), mode="bilinear", align_corners=False)[0]
            total = total + self.discount**i * enlarged
            if h == 1 or w == 1:
                break
        return total / total.std()


class Perturbed:
    """Adds noise to the input of the denoiser only, not to its target, against the errors that build up in sampling
    (Ning et al., arXiv:2301.11706).

    strength: gamma, the standard deviation of what is added to eps; 0.1 in the paper.
    share: it falls in a line to 0 over this share of the run.
    """

    def __init__(self, strength: Positive, share: Positive = 1.0):
        self.strength, self.share = strength, share

    def __call__(self, eps_BCHW: Tensor, draws: Draws) -> Tensor:
        strength = self.strength * max(0.0, 1 - draws.position.progress / self.share)
        if not strength:
            return eps_BCHW
        added = send(draws.normal("perturbation", eps_BCHW.shape[1:]), eps_BCHW.device).to(eps_BCHW.dtype)
        return eps_BCHW + strength * added
