"""The denoising objective: predict the noise, the velocity, the clean latents or the flow of a noisy latent.

Numerics only. The model is any `sdft.protocols.DiffusionModel`; nothing here knows what it is made of.

Symbols: z0 clean latents, eps noise, z_t = a z0 + s eps, snr = a^2 / s^2 (see `sdft.objective.prediction`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from sdft.batch import Batch, LossReport
from sdft.errors import UserError
from sdft.hardware import send
from sdft.objective.loss import L2
from sdft.objective.noise import Gaussian, Perturbed
from sdft.objective.noise_schedule import Kind, noise_schedule
from sdft.objective.prediction import target_of, weight_for_eps
from sdft.objective.prior import NoisyBatch, Prior
from sdft.objective.timesteps import UniformTimesteps
from sdft.objective.weighting import Uniform
from sdft.protocols import DiffusionModel, Loss, Noise, Objective, Prediction, TimestepDistribution, Weighting
from sdft.rng import Draws
from sdft.types import Fraction, NonNegative


class Denoising(Objective):
    """Predict the noise (`epsilon`), the velocity (`v_prediction`), z0 (`sample`) or the flow (`flow_prediction`).

    weighting: of the error, by timestep; `Uniform` if None.
    timesteps: their distribution; `UniformTimesteps` if None.
    zero_terminal_snr: train on a schedule that ends in pure noise; only with v_prediction, as epsilon is 0/0 there.
    loss: the error of each element; `L2` if None.
    noise: the distribution of eps; `Gaussian` if None.
    prior: a second loss that keeps what the base does with another caption, or outside of masks.
    stratified: spread the timesteps of each optimizer step evenly, which lowers the variance of its gradient.
    input_perturbation: standard deviation of noise that is added to the input alone, falling to 0 over
        `perturbed_share` of the run.
    outside: weight of the error where the mask of an image is 0, if it has one (`data.masks`); 1 where it is 1.
    normalise_mask: divide by the sum of these weights, so that a small subject counts as much as a large one; false
        divides by the size of the image.

    Raises UserError for options that exclude each other.
    """

    prediction: Prediction

    def __init__(
        self,
        prediction: Prediction = "epsilon",
        weighting: Weighting | None = None,
        timesteps: TimestepDistribution | None = None,
        zero_terminal_snr: bool = False,
        loss: Loss | None = None,
        noise: Noise | None = None,
        prior: Prior | None = None,
        stratified: bool = False,
        input_perturbation: NonNegative = 0.0,
        perturbed_share: Fraction = 1.0,
        outside: Fraction = 0.0,
        normalise_mask: bool = True,
    ):
        if zero_terminal_snr and prediction != "v_prediction":
            raise UserError(
                f"objective.zero_terminal_snr=true: {prediction} is not defined at zero signal; "
                "choose objective=v_zero_snr"
            )
        if perturbed_share == 0 or (perturbed_share != 1 and not input_perturbation):
            raise UserError(
                f"objective.perturbed_share={perturbed_share}: is the part of the run with a perturbation; set "
                "objective.input_perturbation=0.1 too, or leave it at 1"
            )
        self.prediction, self.zero_terminal_snr, self.prior = prediction, zero_terminal_snr, prior
        self.weighting, self.timesteps = weighting or Uniform(), timesteps or UniformTimesteps()
        self.loss, self.noise, self.stratified = loss or L2(), noise or Gaussian(), stratified
        self.perturbed = Perturbed(input_perturbation, perturbed_share) if input_perturbation else None
        self.outside, self.normalise_mask, self.needs_adapters = outside, normalise_mask, prior is not None
        self.schedule: Kind = "zero_terminal_snr" if zero_terminal_snr else "variance_preserving"
        if prediction == "flow_prediction":
            self.schedule = "flow"
        if prediction not in self.weighting.predictions:
            defined = " and ".join(self.weighting.predictions)
            name = type(self.weighting).__name__.lower()
            raise UserError(f"objective/weighting={name} is defined for {defined}; choose min_snr with {prediction}")

    def attach(self, base: Callable[[], AbstractContextManager[None]]) -> None:
        if self.prior is not None:
            self.prior.attach(base)

    def __call__(self, model: DiffusionModel, batch: Batch, draws: Draws) -> LossReport:
        """The weighted error of each sample; the value `eps_mse` compares across objectives."""
        schedule = noise_schedule(self.schedule, model.noise_config)
        z0 = model.encode_images(batch, send(draws.normal("posterior", model.latent_shape(batch)), model.device))
        cond = model.condition(batch)
        eps = self.noise(draws, z0)
        u_B = draws.stratified("timestep") if self.stratified else draws.uniform("timestep")
        t_B = self.timesteps(u_B, len(schedule))
        snr_B, time_B = schedule.snr[t_B], t_B / len(schedule)
        a, s = schedule.at(t_B, z0.device)
        z_t = a * z0 + s * (self.perturbed(eps, draws) if self.perturbed else eps)
        told_B = send(schedule.times[t_B], z0.device)
        prediction = model.denoise(z_t, told_B, cond)
        target = target_of(self.prediction, z0, eps, a, s)

        error_BCHW = self.loss(prediction, target, snr_B, time_B)
        squared_BCHW = error_BCHW if isinstance(self.loss, L2) else (prediction - target).detach().square()
        mse_B = squared_BCHW.mean(dim=(1, 2, 3))
        error_B = mse_B if isinstance(self.loss, L2) else error_BCHW.mean(dim=(1, 2, 3))
        if batch.mask_B1HW is not None:
            error_B = masked_mean(error_BCHW, batch.mask_B1HW, self.outside, self.normalise_mask)
        weight_B = send(self.weighting.at_time(time_B, snr_B, self.prediction).float(), z0.device).to(error_B.dtype)
        per_sample_B, figures = weight_B * error_B, {"eps_mse": self.eps_mse(mse_B, snr_B)}
        if self.prior is not None:
            prior_B = self.prior(model, NoisyBatch(z_t, told_B, cond, prediction, batch.mask_B1HW))
            per_sample_B, figures["prior"] = per_sample_B + self.prior.weight * prior_B, prior_B
        return LossReport(per_sample_B, figures, time_B)

    def eps_mse(self, mse_B: Tensor, snr_B: Tensor) -> Tensor:
        """The squared errors of the prediction as squared errors of eps. snr_B: on the CPU."""
        if self.prediction == "epsilon":
            return mse_B
        factor_B = weight_for_eps(torch.ones_like(snr_B), snr_B, self.prediction)
        return mse_B * send(factor_B.float(), mse_B.device).to(mse_B.dtype)

    def for_validation(self) -> Denoising:
        """The same prediction, unweighted and over all timesteps, so that `eps_mse` compares between runs.

        A flow is measured at the signal-to-noise ratios of the usual schedule, at which the others are.
        """
        return self.comparable(self.prediction, self.zero_terminal_snr)

    @classmethod
    def comparable(
        cls, prediction: Prediction, zero_terminal_snr: bool, timesteps: TimestepDistribution | None = None
    ) -> Denoising:
        """The unweighted objective whose `eps_mse` compares with that of models that predict something else."""
        objective = cls(prediction, timesteps=timesteps, zero_terminal_snr=zero_terminal_snr)
        if prediction == "flow_prediction":
            objective.schedule = "matched_flow"
        return objective


def masked_mean(error_BCHW: Tensor, mask_B1HW: Tensor, outside: float, normalise: bool = True) -> Tensor:
    """The mean of an error in latent space, weighted by `mask + outside (1 - mask)`, for each sample.

    The mask has the size of the pixels and is averaged over the area of each latent.

    normalise: divide by the sum of the weights, so that a small subject counts as much as a large one; a sample without
        any weight counts 0. False divides by the number of latents.
    """
    mask_B1HW = F.interpolate(mask_B1HW.to(error_BCHW.dtype), error_BCHW.shape[2:], mode="area")
    weight_B1HW = mask_B1HW + outside * (1 - mask_B1HW)
    weighted_B1HW = weight_B1HW * error_BCHW.mean(1, keepdim=True)
    if not normalise:
        return weighted_B1HW.mean(dim=(1, 2, 3))
    return weighted_B1HW.sum(dim=(1, 2, 3)) / weight_B1HW.sum(dim=(1, 2, 3)).clamp_min(1e-6)
