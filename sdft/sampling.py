"""From prompts to pictures: diffusers' schedulers, batched, one generator a picture.

A picture depends on its own weights, prompt, seed and settings, never on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sdft.data.images import to_uint8
from sdft.models.sdxl import SDXL
from sdft.rng import generator
from sdft.types import Conditioning, Count, Fraction, NonNegative, UserError

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
Name = Literal["euler", "euler_a", "ddim", "dpmpp_2m", "dpmpp_2m_karras", "unipc"]


class Sampler:
    """How pictures are drawn.

    name: the solver.
    steps: evaluations of the model.
    cfg: classifier-free guidance scale; 1 switches guidance off.
    negative: what to guide away from; empty is the model's empty prompt.
    rescale: share of the guidance rescaling of Lin et al. (arXiv:2305.08891, section 3.4).
    batch_size: pictures at a time; it does not change them beyond float rounding.
    """

    def __init__(
        self,
        name: Name = "euler",
        steps: Count = 25,
        cfg: NonNegative = 5.0,
        negative: str = "",
        rescale: Fraction = 0.0,
        batch_size: Count = 8,
    ):
        self.name, self.steps, self.cfg, self.negative = name, steps, cfg, negative
        self.rescale, self.batch_size = rescale, batch_size

    def scheduler(self, model: SDXL):
        """A fresh diffusers scheduler on the model's own noise schedule."""
        class_name, options = SCHEDULERS[self.name]
        return getattr(diffusers, class_name).from_config(model.scheduler.config, **options)


@torch.no_grad()
def generate(
    model: SDXL,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Sampler,
    size_hw: tuple[int, int],
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: str | None = None,
) -> np.ndarray:
    """Pictures of `prompts`, B x H x W x 3 bytes; picture i starts from the noise of seed i.

    progress: the label of a progress bar, or None for no bar.
    """
    if len(prompts) != len(seeds):
        raise UserError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    factor = model.vae_factor * 2 ** (len(model.unet.config.block_out_channels) - 1)
    if any(side % factor for side in size_hw):
        raise UserError(f"size {size_hw}: both sides must be multiples of {factor}")
    was_training = model.training
    model.eval()
    pictures = []
    with (
        torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"),
        tqdm(total=len(prompts), desc=progress, unit="image", disable=progress is None, leave=False) as bar,
    ):
        for first in range(0, len(prompts), sampler.batch_size):
            chosen = slice(first, first + sampler.batch_size)
            latents = _solve(model, prompts[chosen], seeds[chosen], sampler, size_hw)
            pictures.append(to_uint8(model.decode(latents)))
            bar.update(len(latents))
    model.train(was_training)
    return np.concatenate(pictures)


def _solve(model: SDXL, prompts: Sequence[str], seeds: Sequence[int], sampler: Sampler, size_hw) -> Tensor:
    """Latents of the finished pictures."""
    scheduler = sampler.scheduler(model)
    scheduler.set_timesteps(sampler.steps, device=model.device)
    channels, (h, w) = model.unet.config.in_channels, (side // model.vae_factor for side in size_hw)
    noise = [torch.randn(channels, h, w, generator=generator(seed, "sample noise")) for seed in seeds]
    z_t = torch.stack(noise).to(model.device) * scheduler.init_noise_sigma
    step_options = {}
    if sampler.name == "euler_a":
        # One generator a picture, so that its noise does not depend on its neighbours.
        step_options["generator"] = [generator(seed, "sampler noise") for seed in seeds]
    cond = _condition(model, prompts, sampler, size_hw)
    for t in scheduler.timesteps:
        z_in = scheduler.scale_model_input(z_t, t)
        prediction = _guided(model, z_in, t, cond, sampler)
        z_t = scheduler.step(prediction, t, z_t, return_dict=False, **step_options)[0]
    return z_t


def _condition(model: SDXL, prompts: Sequence[str], sampler: Sampler, size_hw: tuple[int, int]) -> Conditioning:
    """The conditioning of the prompts and, when there is guidance, of the negatives before them."""
    captions, dropped = list(prompts), [False] * len(prompts)
    if sampler.cfg != 1:
        captions = [sampler.negative] * len(prompts) + captions
        dropped = [not sampler.negative] * len(prompts) + dropped
    context_BLD, pooled_BP = model.encode_prompts(captions, torch.tensor(dropped, device=model.device))
    time_ids = torch.tensor([(*size_hw, 0, 0, *size_hw)], dtype=torch.float32, device=model.device)
    return Conditioning(context_BLD, pooled_BP, time_ids.expand(len(captions), -1))


def _guided(model: SDXL, z_in: Tensor, t: Tensor, cond: Conditioning, sampler: Sampler) -> Tensor:
    if sampler.cfg == 1:
        return model.denoise(z_in, t.expand(len(z_in)), cond)
    without, with_prompt = model.denoise(torch.cat([z_in] * 2), t.expand(2 * len(z_in)), cond).chunk(2)
    guided = without + sampler.cfg * (with_prompt - without)
    if sampler.rescale:
        dims = (1, 2, 3)
        matched = guided * (with_prompt.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
        guided = torch.lerp(guided, matched, sampler.rescale)
    return guided
