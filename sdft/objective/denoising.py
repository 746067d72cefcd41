"""The denoising objective: predict the noise or the velocity of a noisy latent.

Numerics only. The model is any `sdft.protocols.DiffusionModel`; nothing here knows what it is made of.

Symbols: z0 clean latents, eps noise, z_t = a z0 + s eps with a^2 + s^2 = 1, snr = a^2 / s^2, v = a eps - s z0
(Salimans and Ho, arXiv:2202.00512, for v).
"""

from __future__ import annotations

from torch import Tensor

from sdft.batch import Batch, LossReport
from sdft.errors import UserError
from sdft.hardware import send
from sdft.objective.noise_schedule import noise_schedule
from sdft.objective.timesteps import UniformTimesteps
from sdft.objective.weighting import Uniform
from sdft.protocols import DiffusionModel, Objective, Prediction, TimestepDistribution, Weighting
from sdft.rng import Draws
from sdft.types import NonNegative


class Denoising(Objective):
    """Predict the noise (`epsilon`) or the velocity (`v_prediction`) of z_t.

    weighting: of the squared error, by SNR; `Uniform` if None.
    timesteps: their distribution; `UniformTimesteps` if None.
    zero_terminal_snr: train on a schedule that ends in pure noise; only with v_prediction, as epsilon is 0/0 there.
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
    ):
        if zero_terminal_snr and prediction == "epsilon":
            raise UserError(
                "objective.zero_terminal_snr=true: epsilon is 0/0 at zero signal; choose objective=v_zero_snr"
            )
        self.prediction, self.zero_terminal_snr = prediction, zero_terminal_snr
        self.weighting, self.timesteps = weighting or Uniform(), timesteps or UniformTimesteps()
        self.offset_noise = offset_noise
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
        mse_B = (prediction - target).square().mean(dim=(1, 2, 3))
        weight_B = send(self.weighting(schedule.snr[t_B], self.prediction).float(), mse_B.device).to(mse_B.dtype)
        # An error d in v is an error a d in eps: eps = a v + s z_t.
        eps_mse_B = mse_B if self.prediction == "epsilon" else mse_B * a.flatten().square()
        return LossReport(weight_B * mse_B, {"eps_mse": eps_mse_B})

    def for_validation(self) -> Denoising:
        """The same prediction, unweighted and over all timesteps, so that `eps_mse` compares between runs."""
        return Denoising(self.prediction, zero_terminal_snr=self.zero_terminal_snr)

    def _noise(self, draws: Draws, shape: tuple[int, int, int]) -> Tensor:
        eps = draws.normal("noise", shape)
        if self.offset_noise:
            eps = eps + self.offset_noise * draws.normal("offset", (shape[0], 1, 1))
        return eps
