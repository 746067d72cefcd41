"""How well a subject's model denoises held-out pictures, at some of the noise levels: no picture is drawn for it."""

from __future__ import annotations

import numpy as np
import torch

from sdft.data.dataset import Pictures, batches
from sdft.evaluation.metrics.measure import Drawn, Lab
from sdft.evaluation.results import Estimate, Metric
from sdft.evaluation.statistics import estimate
from sdft.objective.denoising import Denoising
from sdft.objective.timesteps import UniformTimesteps
from sdft.rng import Draws
from sdft.types import Count, Fraction

SEED = 0


class ValidationLoss:
    """The squared error in the noise, on (image, timestep, noise) triples that are the same for every subject.

    low, high: of the timesteps, as fractions of the schedule; 1 is pure noise.
    num_images, size: held-out pictures, and their side in pixels.
    batch_size: pictures at a time.
    """

    needs = ("held_out",)

    def __init__(
        self, size: Count, low: Fraction = 0.0, high: Fraction = 1.0, num_images: Count = 64, batch_size: Count = 8
    ):
        self.size, self.num_images, self.batch_size = size, num_images, batch_size
        self.timesteps = UniformTimesteps(low, high)
        first, last = round(low * 1000), round(high * 1000)
        told = f"Error in the noise of held-out pictures at the timesteps {first} to {last}."
        self.metric = Metric(f"loss_{first}_{last}", f"loss t {first}–{last}", "lower", told)

    @torch.no_grad()
    def __call__(self, drawn: Drawn, lab: Lab) -> Estimate | None:
        assert lab.held_out is not None
        pictures, found = Pictures(lab.held_out, (self.size, self.size), seed=SEED), []
        indices = range(min(self.num_images, len(lab.held_out.keys)))
        with drawn.open() as model:
            config = model.scheduler.config
            question = Denoising(
                config.prediction_type, timesteps=self.timesteps, zero_terminal_snr=config.rescale_betas_zero_snr
            )
            for batch in batches(pictures, indices, self.batch_size):
                report = question(model, batch.to(model.device), Draws(SEED, batch.keys, batch.visits))
                found.append(report.figures["eps_mse"].cpu().numpy())
        losses = np.concatenate(found)
        return estimate(losses, list(range(len(losses))))
