"""The validation loss of a subject's model on held-out images, in a range of timesteps; generates no images."""

from __future__ import annotations

import numpy as np
import torch

from sdft.data.dataset import ImageDataset, batches
from sdft.evaluation.metrics.protocol import GeneratedImages, MetricInputs
from sdft.evaluation.results import Estimate, MetricInfo
from sdft.evaluation.statistics import estimate
from sdft.objective.denoising import Denoising
from sdft.objective.timesteps import UniformTimesteps
from sdft.rng import Draws
from sdft.types import Count, Fraction

SEED = 0


class ValidationLoss:
    """Mean squared error of the predicted noise, on the same (image, timestep, noise) triples for all subjects.

    low, high: range of the timesteps, as fractions of the noise schedule; 1 is pure noise.
    num_images, size: number of held-out images, and their side in pixels.
    batch_size: images per forward pass.
    """

    needs = ("held_out",)

    def __init__(
        self, size: Count, low: Fraction = 0.0, high: Fraction = 1.0, num_images: Count = 64, batch_size: Count = 8
    ):
        self.size, self.num_images, self.batch_size = size, num_images, batch_size
        self.timesteps = UniformTimesteps(low, high)
        first, last = round(low * 1000), round(high * 1000)
        meaning = f"Error in the noise of held-out images at timesteps {first} to {last}."
        self.info = MetricInfo(f"loss_{first}_{last}", f"loss t {first}–{last}", "lower", meaning)

    @torch.no_grad()
    def __call__(self, generated: GeneratedImages, inputs: MetricInputs) -> Estimate | None:
        assert inputs.held_out is not None
        pictures, losses = ImageDataset(inputs.held_out, (self.size, self.size), seed=SEED), []
        indices = range(min(self.num_images, len(inputs.held_out.keys)))
        with generated.open() as model:
            config = model.scheduler.config
            objective = Denoising.comparable(
                config.prediction_type, config.rescale_betas_zero_snr, timesteps=self.timesteps
            )
            for batch in batches(pictures, indices, self.batch_size):
                report = objective(model, batch.to(model.device), Draws(SEED, batch.keys, batch.visits))
                losses.append(report.figures["eps_mse"].cpu().numpy())
        errors = np.concatenate(losses)
        return estimate(errors, list(range(len(errors))))
