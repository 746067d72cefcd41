"""From prompts to pictures: diffusers' schedulers, batched, one generator a picture.

A picture depends on its own weights, prompt, seed and settings, never on what else is in the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sdft.batch import Conditioning
from sdft.data.images import to_uint8
from sdft.errors import UserError
from sdft.models.sdxl import SDXL
from sdft.rng import generator
from sdft.sampling.guidance import guided
from sdft.sampling.samplers import Sampler
from sdft.types import DTYPES, Precision


class PromptEmbeddings:
    """What a model reads of each prompt, encoded once and by itself, so that no other prompt touches its rounding."""

    def __init__(self, model: SDXL):
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
    model: SDXL,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Sampler,
    size_hw: tuple[int, int],
    precision: Precision = "fp32",
    progress: str | None = None,
    texts: PromptEmbeddings | None = None,
) -> np.ndarray:
    """Pictures of `prompts`, B x H x W x 3 bytes; picture i starts from the noise of seed i.

    precision: of autocast; fp32 computes in the dtype of the weights.
    progress: the label of a progress bar, or None for no bar.
    texts: of this model with these weights, where several calls share prompts.
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


def refuse_size(model: SDXL, size_hw: tuple[int, int]) -> None:
    """Raise UserError where the VAE and the UNet cannot halve the sides."""
    factor = model.vae_factor * 2 ** (len(model.unet.config.block_out_channels) - 1)
    if any(side % factor for side in size_hw):
        raise UserError(f"size {size_hw}: both sides must be multiples of {factor}")


def _solve(model: SDXL, cond: Conditioning, seeds: Sequence[int], sampler: Sampler, size_hw: tuple[int, int]) -> Tensor:
    """Latents of the finished pictures."""
    scheduler = sampler.scheduler(model)
    try:
        scheduler.set_timesteps(sampler.steps, device=model.device)
    except ValueError as error:
        raise UserError(f"sampler.steps={sampler.steps}: {sampler.name} cannot do that ({error})") from error
    channels, (h, w) = model.unet.config.in_channels, (side // model.vae_factor for side in size_hw)
    noise = [torch.randn(channels, h, w, generator=generator(seed, "sample noise")) for seed in seeds]
    z_t = torch.stack(noise).to(model.device) * scheduler.init_noise_sigma
    step_options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        # One generator a picture, so that its noise does not depend on its neighbours.
        step_options["generator"] = [generator(seed, "sampler noise") for seed in seeds]
    for t in scheduler.timesteps:
        z_in = scheduler.scale_model_input(z_t, t)
        prediction = guided(model, z_in, t, cond, sampler)
        z_t = scheduler.step(prediction, t, z_t, return_dict=False, **step_options)[0]
    return z_t


def _condition(
    texts: PromptEmbeddings, prompts: Sequence[str], sampler: Sampler, size_hw: tuple[int, int]
) -> Conditioning:
    """The conditioning of the prompts and, when there is guidance, of the negatives before them."""
    captions, dropped = list(prompts), [False] * len(prompts)
    if sampler.cfg != 1:
        captions = [sampler.negative] * len(prompts) + captions
        dropped = [not sampler.negative] * len(prompts) + dropped
    context_BLD, pooled_BP = texts(captions, dropped)
    time_ids = torch.tensor([(*size_hw, 0, 0, *size_hw)], dtype=torch.float32, device=context_BLD.device)
    return Conditioning(context_BLD, pooled_BP, time_ids.expand(len(captions), -1))
