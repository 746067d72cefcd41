"""Images from prompts, in batches.

An image depends on the weights and on its own prompt, seed and settings, not on the other images of its batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sdft.batch import Conditioning
from sdft.data.images import to_uint8
from sdft.errors import UserError
from sdft.progress import tqdm
from sdft.protocols import DiffusionModel
from sdft.rng import generator
from sdft.sampling.guidance import guided
from sdft.sampling.samplers import Sampler
from sdft.types import DTYPES, Precision


class PromptEmbeddings:
    """Caches the embeddings of prompts. Each is encoded alone, so that other prompts do not change its rounding."""

    def __init__(self, model: DiffusionModel):
        self.model = model
        self._states: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}

    def __call__(self, captions: Sequence[str], dropped: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """(context_BLD, pooled_BP)."""
        states = [self._one(*key) for key in zip(captions, dropped, strict=True)]
        return torch.cat([context for context, _ in states]), torch.cat([pooled for _, pooled in states])

    def _one(self, caption: str, dropped: bool) -> tuple[Tensor, Tensor]:
        if (caption, dropped) not in self._states:
            marked = torch.tensor([dropped], device=self.model.device)
            self._states[caption, dropped] = self.model.encode_prompts([caption], marked)
        return self._states[caption, dropped]


@torch.no_grad()
def generate(
    model: DiffusionModel,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Sampler,
    size_hw: tuple[int, int],
    precision: Precision = "fp32",
    progress: str | None = None,
    texts: PromptEmbeddings | None = None,
) -> np.ndarray:
    """Images of `prompts`, uint8 B x H x W x 3; image i starts from the noise of seed i.

    precision: of autocast; fp32 computes in the dtype of the weights.
    progress: label of a progress bar; None for no bar.
    texts: cached embeddings of this model with these weights, if several calls share prompts.

    Raises UserError for sizes that the model cannot draw, or steps that the sampler cannot do.
    """
    if len(prompts) != len(seeds):
        raise UserError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    refuse_size(model, size_hw)
    texts = texts or PromptEmbeddings(model)
    was_training = model.training
    model.eval()
    pictures = []
    with (
        torch.autocast(model.device.type, DTYPES[precision], enabled=precision != "fp32"),
        tqdm(total=len(prompts), desc=progress, unit="image", disable=progress is None, leave=False) as bar,
    ):
        for first in range(0, len(prompts), sampler.batch_size):
            chosen = slice(first, first + sampler.batch_size)
            cond = _condition(texts, prompts[chosen], sampler, size_hw)
            latents = _solve(model, cond, seeds[chosen], sampler, size_hw)
            pictures.append(to_uint8(model.decode(latents)))
            bar.update(len(latents))
    model.train(was_training)
    return np.concatenate(pictures)


def refuse_size(model: DiffusionModel, size_hw: tuple[int, int]) -> None:
    """Raise UserError if the model cannot draw images of this size."""
    if any(side % model.size_multiple for side in size_hw):
        raise UserError(f"size {size_hw}: both sides must be multiples of {model.size_multiple}")


def _solve(
    model: DiffusionModel, cond: Conditioning, seeds: Sequence[int], sampler: Sampler, size_hw: tuple[int, int]
) -> Tensor:
    """Denoised latents."""
    scheduler = sampler.with_timesteps(model)
    channels, (h, w) = model.latent_channels, (side // model.vae_factor for side in size_hw)
    noise = [torch.randn(channels, h, w, generator=generator(seed, "sample noise")) for seed in seeds]
    z_t = torch.stack(noise).to(model.device) * scheduler.init_noise_sigma
    step_options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        # One generator per image, so that its noise does not depend on the rest of the batch.
        step_options["generator"] = [generator(seed, "sampler noise") for seed in seeds]
    for t in scheduler.timesteps:
        z_in = scheduler.scale_model_input(z_t, t)
        prediction = guided(model, z_in, t, cond, sampler)
        z_t = scheduler.step(prediction, t, z_t, return_dict=False, **step_options)[0]
    return z_t


def _condition(
    texts: PromptEmbeddings, prompts: Sequence[str], sampler: Sampler, size_hw: tuple[int, int]
) -> Conditioning:
    """The conditioning of the prompts; with guidance, that of the negative prompts comes first."""
    captions, dropped = list(prompts), [False] * len(prompts)
    if sampler.cfg != 1:
        captions = [sampler.negative] * len(prompts) + captions
        dropped = [not sampler.negative] * len(prompts) + dropped
    context_BLD, pooled_BP = texts(captions, dropped)
    return texts.model.condition_prompts(context_BLD, pooled_BP, size_hw)
