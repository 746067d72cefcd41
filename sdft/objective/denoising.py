"""The denoising objective: predict the noise or the velocity of a noisy latent.

Numerics only. The model is any `sdft.protocols.DiffusionModel`; nothing here knows what it is made of.

Symbols: z0 clean latents, eps noise, z_t = a z0 + s eps with a^2 + s^2 = 1, snr = a^2 / s^2, v = a eps - s z0
(Salimans and Ho, arXiv:2202.00512, for v).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sdft.batch import Batch, LossReport
from sdft.errors import UserError
from sdft.hardware import send
from sdft.objective.noise_schedule import noise_schedule
from sdft.objective.timesteps import UniformTimesteps
from sdft.objective.weighting import Uniform
from sdft.protocols import DiffusionModel, Objective, Prediction, TimestepDistribution, Weighting
from sdft.rng import Draws
from sdft.types import Fraction, NonNegative


class Denoising(Objective):
    """Predict the noise (`epsilon`) or the velocity (`v_prediction`) of z_t.

    weighting: of the squared error, by SNR; `Uniform` if None.
    timesteps: their distribution; `UniformTimesteps` if None.
    zero_terminal_snr: train on a schedule that ends in pure noise; only with v_prediction, as epsilon is 0/0 there.
    outside: weight of the error where the mask of an image is 0, if it has one (`data.masks`); 1 where it is 1.
    offset_noise: adds one normal number per channel to the noise, times this (0.0357 trained the base SDXL).
    """

    prediction: Prediction

    def __init__(
        self,
        prediction: Prediction = "epsilon",
        weighting: Weighting | None = None,
        timesteps: TimestepDistribution | None = None,
        zero_terminal_snr: bool = False,
        offset_noise: NonNegative = 0.0,
        outside: Fraction = 0.0,
    ):
        if zero_terminal_snr and prediction == "epsilon":
            raise UserError(
                "objective.zero_terminal_snr=true: epsilon is 0/0 at zero signal; choose objective=v_zero_snr"
            )
        self.prediction, self.zero_terminal_snr = prediction, zero_terminal_snr
        self.weighting, self.timesteps = weighting or Uniform(), timesteps or UniformTimesteps()
        self.offset_noise, self.outside = offset_noise, outside
        if prediction not in self.weighting.predictions:
            defined = " and ".join(self.weighting.predictions)
            name = type(self.weighting).__name__.lower()
            raise UserError(f"objective/weighting={name} is defined for {defined}; choose min_snr with {prediction}")

    def __call__(self, model: DiffusionModel, batch: Batch, draws: Draws) -> LossReport:
        """The weighted squared error of each sample; the value `eps_mse` compares across objectives."""
        schedule = noise_schedule(self.zero_terminal_snr, model.noise_config)
        shape = model.latent_shape(batch)
        z0 = model.encode_images(batch, send(draws.normal("posterior", shape), model.device))
        cond = model.condition(batch)
        eps = send(self._noise(draws, shape), z0.device).to(z0.dtype)
        t_B = self.timesteps(draws.uniform("timestep"), len(schedule))
        a, s = schedule.at(t_B, z0.device)
        prediction = model.denoise(a * z0 + s * eps, send(t_B, z0.device), cond)
        target = eps if self.prediction == "epsilon" else a * eps - s * z0
        error_BCHW = (prediction - target).square()
        mse_B = error_BCHW.mean(dim=(1, 2, 3))
        counted_B = mse_B if batch.mask_B1HW is None else masked_mean(error_BCHW, batch.mask_B1HW, self.outside)
        weight_B = send(self.weighting(schedule.snr[t_B], self.prediction).float(), mse_B.device).to(mse_B.dtype)
        # An error d in v is an error a d in eps: eps = a v + s z_t.
        eps_mse_B = mse_B if self.prediction == "epsilon" else mse_B * a.flatten().square()
        return LossReport(weight_B * counted_B, {"eps_mse": eps_mse_B})

    def for_validation(self) -> Denoising:
        """The same prediction, unweighted and over all timesteps, so that `eps_mse` compares between runs."""
        return Denoising(self.prediction, zero_terminal_snr=self.zero_terminal_snr)

    def _noise(self, draws: Draws, shape: tuple[int, int, int]) -> Tensor:
        eps = draws.normal("noise", shape)
        if self.offset_noise:
            eps = eps + self.offset_noise * draws.normal("offset", (shape[0], 1, 1))
        return eps


def masked_mean(error_BCHW: Tensor, mask_B1HW: Tensor, outside: float) -> Tensor:
    """The mean of an error in latent space, weighted by `mask + outside (1 - mask)`, for each sample.

    The mask has the size of the pixels and is averaged over the area of each latent. The weights are normalised, so
    that a small subject counts as much as a large one; a sample without any weight counts 0.
    """
    mask_B1HW = F.interpolate(mask_B1HW.to(error_BCHW.dtype), error_BCHW.shape[2:], mode="area")
    weight_B1HW = mask_B1HW + outside * (1 - mask_B1HW)
    total_B = weight_B1HW.sum(dim=(1, 2, 3))
    return (weight_B1HW * error_BCHW.mean(1, keepdim=True)).sum(dim=(1, 2, 3)) / total_B.clamp_min(1e-6)
