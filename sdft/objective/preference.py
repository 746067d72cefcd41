"""Tuning by preferences between two pictures of a caption: Diffusion-DPO (Wallace et al., arXiv:2311.12908).

Symbols: z_w and z_l the latents of the preferred (winning) and the rejected (losing) picture of a caption, noised alike
to z_t = a z0 + s eps; err = |eps - eps_model(z_t)|^2, of the trained model and of the reference, which is the model as
it was before training.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sdft.batch import Batch, Conditioning, LossReport
from sdft.errors import UserError
from sdft.hardware import send
from sdft.objective.denoising import Denoising
from sdft.objective.noise import Gaussian
from sdft.objective.noise_schedule import noise_schedule
from sdft.objective.prediction import target_of
from sdft.objective.timesteps import UniformTimesteps
from sdft.protocols import DiffusionModel, Objective, Prediction, TimestepDistribution
from sdft.rng import Draws
from sdft.types import Positive


class Preference(Objective):
    """Denoise preferred pictures better than the reference does, by more than rejected ones:

        loss = -log sigmoid(-beta / 2 ((err_w - ref_err_w) - (err_l - ref_err_l)))

    which is equation 14 of the paper with its T omega folded into beta, and each err the mean over the latents of the
    squared error of eps. Both pictures of a pair have the same timestep and the same noise.

    prediction: what the model predicts; its errors count as errors of eps.
    beta: how much the model may leave the reference: the smaller, the farther. The paper has 2000 for SD 1.5 and 5000
        for SDXL.
    timesteps: their distribution; `UniformTimesteps` if None.

    The reference runs first and without gradients: a tuning may change weights in place to compute as before, which the
    graph of the trained model must not see. It needs no memory beside that graph, only the time of a forward pass.
    """

    prediction: Prediction

    def __init__(
        self,
        prediction: Literal["epsilon", "v_prediction"] = "epsilon",
        beta: Positive = 5000.0,
        timesteps: TimestepDistribution | None = None,
    ):
        self.prediction, self.beta = prediction, beta
        self.timesteps = timesteps or UniformTimesteps()
        self._base: Callable[[], AbstractContextManager[None]] | None = None

    def attach(self, base: Callable[[], AbstractContextManager[None]]) -> None:
        self._base = base

    def __call__(self, model: DiffusionModel, batch: Batch, draws: Draws) -> LossReport:
        """The loss of each pair; `accuracy`, the share of pairs that the model orders rightly by its change from the
        reference, where no change counts as half; and the `eps_mse` of the preferred pictures.

        Raises UserError for a batch without pairs.
        """
        assert self._base is not None, "the module attaches the base"
        rejected = batch.rejected
        if rejected is None:
            raise UserError("objective=preference: the batch has no rejected pictures; choose data=preference")
        z_t, told, target, a = self._noised(model, batch, rejected, draws)

        def errors() -> tuple[Tensor, Tensor]:
            """err_w and err_l of each pair, in one pass through the denoiser."""
            predicted = model.denoise(z_t, told, paired(model.condition(batch), rejected.time_ids_B6))
            err_B2 = (predicted - target).square().mean(dim=(1, 2, 3)).unflatten(0, (-1, 2))
            # An error d of v is an error a d of eps: eps = a v + s z_t.
            err_w, err_l = (err_B2 if self.prediction == "epsilon" else err_B2 * a.reshape(-1, 1).square()).unbind(1)
            return err_w, err_l

        with torch.no_grad(), self._base():
            ref_err_w, ref_err_l = errors()
        err_w, err_l = errors()
        logit_B = -self.beta / 2 * ((err_w - ref_err_w) - (err_l - ref_err_l))  # of preferring w, by the change
        accuracy_B = (logit_B.detach().sign() + 1) / 2
        return LossReport(-F.logsigmoid(logit_B), {"accuracy": accuracy_B, "eps_mse": err_w.detach()})

    def _noised(
        self, model: DiffusionModel, batch: Batch, rejected: Batch, draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z_t of both pictures, what the denoiser is told of t, and the right predictions, all 2B; and the signal a."""
        schedule = noise_schedule("variance_preserving", model.noise_config)
        posterior = send(draws.normal("posterior", model.latent_shape(batch)), model.device)
        z_w, z_l = (model.encode_images(one, posterior) for one in (batch, rejected))
        eps = Gaussian()(draws, z_w)
        t_B = self.timesteps(draws.uniform("timestep"), len(schedule))
        a, s = schedule.at(t_B, z_w.device)
        z_t = beside(*(a * z0 + s * eps for z0 in (z_w, z_l)))
        target = beside(*(target_of(self.prediction, z0, eps, a, s) for z0 in (z_w, z_l)))
        return z_t, send(schedule.times[t_B], z_w.device).repeat_interleave(2), target, a

    def for_validation(self) -> Denoising:
        """Denoising of the preferred pictures, so that `eps_mse` compares with other runs."""
        return Denoising(self.prediction)


def beside(w: Tensor, l: Tensor) -> Tensor:  # noqa: E741  the paper's
    """w0, l0, w1, l1, ...: the rows of a sample are together, as dropout masks that are the samples' own need them."""
    return torch.stack([w, l], dim=1).flatten(0, 1)


def paired(cond: Conditioning, rejected_time_ids_B6: Tensor) -> Conditioning:
    """The conditioning of both pictures of each pair: one caption, and the size and crop of each."""
    context, pooled = (x.repeat_interleave(2, dim=0) for x in (cond.context_BLD, cond.pooled_BP))
    return Conditioning(context, pooled, beside(cond.time_ids_B6, rejected_time_ids_B6))
