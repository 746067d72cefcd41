"""What the model is asked to predict, at which noise levels, and how much each of them counts.

Numerics only: a schedule, targets, timestep laws and weightings as functions of the signal-to-noise ratio. The model
is any object with `encode_images`, `condition` and `denoise`; nothing here knows what it is made of.

Symbols: z0 clean latents, eps noise, z_t = a z0 + s eps with a^2 + s^2 = 1, snr = a^2 / s^2, v = a eps - s z0
(Salimans and Ho, arXiv:2202.00512, for v).
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from sdft.rng import Draws
from sdft.types import Batch, Fraction, LossReport, NonNegative, Positive, UserError

Prediction = Literal["epsilon", "v_prediction"]
NUM_TIMESTEPS = 1000


class NoiseSchedule:
    """SDXL's scaled-linear betas; `zero_terminal_snr` rescales them so that the last step is pure noise.

    The rescaling (Lin et al., arXiv:2305.08891, algorithm 1) comes first: every SNR is that of the rescaled schedule.
    """

    def __init__(self, zero_terminal_snr: bool = False, beta_start: float = 0.00085, beta_end: float = 0.012):
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
        a = (1 - betas).cumprod(0).sqrt()
        if zero_terminal_snr:
            a = (a - a[-1]) * a[0] / (a[0] - a[-1])
        self.a, self.s = a, (1 - a**2).sqrt()
        self.snr = a**2 / (1 - a**2)

    def at(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) of each timestep, B x 1 x 1 x 1, fp32."""
        t = t_B.cpu()
        return tuple(x[t].float().to(t_B.device)[:, None, None, None] for x in (self.a, self.s))


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


class UniformTimesteps:
    """Timesteps spread evenly over [low, high) of the schedule, as fractions of its length."""

    def __init__(self, low: Fraction = 0.0, high: Fraction = 1.0):
        if low >= high:
            raise UserError(f"objective.timesteps: low={low} must be below high={high}")
        self.low, self.high = low, high

    def __call__(self, u_B: Tensor) -> Tensor:
        """Timesteps of uniform numbers in [0, 1)."""
        return ((self.low + (self.high - self.low) * u_B) * NUM_TIMESTEPS).long()


class LogitNormalTimesteps:
    """Timesteps whose logit is normal: more training where `mean` says, in units of the schedule's logit."""

    def __init__(self, mean: float = 0.0, std: Positive = 1.0):
        self.mean, self.std = mean, std

    def __call__(self, u_B: Tensor) -> Tensor:
        """Timesteps of uniform numbers in [0, 1)."""
        normal = torch.special.ndtri(u_B.clamp(1e-9, 1 - 1e-9))
        return (torch.sigmoid(self.mean + self.std * normal) * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)


class Denoising:
    """Predict the noise (`epsilon`) or the velocity (`v_prediction`) of z_t.

    zero_terminal_snr: train down to pure noise; only with v_prediction, since epsilon is 0/0 there.
    offset_noise: adds one normal number a channel to the noise, times this (0.0357 trained the base SDXL).
    """

    def __init__(
        self,
        prediction: Prediction = "epsilon",
        weighting: Weighting | None = None,
        timesteps: UniformTimesteps | LogitNormalTimesteps | None = None,
        zero_terminal_snr: bool = False,
        offset_noise: NonNegative = 0.0,
    ):
        if zero_terminal_snr and prediction == "epsilon":
            raise UserError(
                "objective.zero_terminal_snr=true: epsilon is 0/0 at zero signal; choose objective=v_zero_snr"
            )
        if isinstance(weighting, Debiased) and prediction != "epsilon":
            raise UserError("objective/weighting=debiased is defined for epsilon; choose min_snr with v_prediction")
        self.prediction, self.zero_terminal_snr = prediction, zero_terminal_snr
        self.weighting, self.timesteps = weighting or Uniform(), timesteps or UniformTimesteps()
        self.offset_noise = offset_noise
        self.schedule = NoiseSchedule(zero_terminal_snr)

    def __call__(self, model, batch: Batch, draws: Draws) -> LossReport:
        """The weighted squared error of each sample; the figure `eps_mse` compares across objectives."""
        shape = model.latent_shape(batch)
        z0 = model.encode_images(batch, draws.normal("posterior", shape).to(model.device))
        cond = model.condition(batch)
        eps = self._noise(draws, shape).to(z0)
        t_B = self.timesteps(draws.uniform("timestep")).to(z0.device)
        a, s = self.schedule.at(t_B)
        prediction = model.denoise(a * z0 + s * eps, t_B, cond)
        target = eps if self.prediction == "epsilon" else a * eps - s * z0
        mse_B = (prediction - target).square().mean(dim=(1, 2, 3))
        weight_B = self.weighting(self.schedule.snr[t_B.cpu()], self.prediction).float().to(mse_B)
        # v is wrong by d where eps is wrong by a d: eps = a v + s z_t.
        eps_mse_B = mse_B if self.prediction == "epsilon" else mse_B * a.flatten().square()
        return LossReport(weight_B * mse_B, {"eps_mse": eps_mse_B})

    def comparable(self) -> Denoising:
        """The same question unweighted and over all timesteps: its `eps_mse` compares between runs."""
        return Denoising(self.prediction, zero_terminal_snr=self.zero_terminal_snr)

    def _noise(self, draws: Draws, shape: tuple[int, int, int]) -> Tensor:
        eps = draws.normal("noise", shape)
        if self.offset_noise:
            eps = eps + self.offset_noise * draws.normal("offset", (shape[0], 1, 1))
        return eps
