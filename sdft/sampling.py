"""From prompts to pictures: diffusers' schedulers, batched, one generator a picture.

A picture depends on its own weights, prompt, seed and settings, never on what else is in the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import diffusers
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sdft.data.images import to_uint8
from sdft.models.sdxl import SDXL
from sdft.objective import NoiseSchedule
from sdft.rng import generator
from sdft.types import Conditioning, Count, Fraction, NonNegative, UserError

DPMPP, DPMPP_SDE, KARRAS = {"algorithm_type": "dpmsolver++"}, {"algorithm_type": "sde-dpmsolver++"}, "use_karras_sigmas"

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", DPMPP),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {**DPMPP, KARRAS: True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", DPMPP_SDE),
    "dpmpp_2m_sde_karras": ("DPMSolverMultistepScheduler", {**DPMPP_SDE, KARRAS: True}),
    # The singlestep solver: the scheduler that other programs mean needs torchsde, whose noise is one tree for the
    # whole batch.
    "dpmpp_sde": ("DPMSolverSinglestepScheduler", {**DPMPP_SDE, "lower_order_final": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
}
Name = Literal[
    "euler",
    "euler_a",
    "heun",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_karras",
    "dpmpp_sde",
    "unipc",
    "lcm",
]


class Sampler:
    """How pictures are drawn.

    name: the solver. `heun` looks at the model twice a step; `lcm` is for models distilled for it.
    steps: of the solver.
    cfg: classifier-free guidance scale; 1 switches guidance off.
    negative: what to guide away from; empty is the model's empty prompt.
    rescale: share of the guidance rescaling of Lin et al. (arXiv:2305.08891, section 3.4); 0.7 for zero-SNR models.
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

    def scheduler(self, model: SDXL) -> Any:
        """A fresh diffusers scheduler on the model's own noise schedule."""
        class_name, options = SCHEDULERS[self.name]
        solver, config = getattr(diffusers, class_name), model.scheduler.config
        if config.rescale_betas_zero_snr and "rescale_betas_zero_snr" not in inspect.signature(solver).parameters:
            options = {**options, "trained_betas": zero_snr_betas()}
        return solver.from_config(config, **options)


def zero_snr_betas() -> list[float]:
    """The schedule that ends in pure noise, for solvers that do not know it; 2^-24 is how near diffusers goes to 0."""
    signal = NoiseSchedule(zero_terminal_snr=True).a.square().clamp(min=2**-24)
    return (1 - signal / torch.cat([torch.ones(1), signal[:-1]])).tolist()


class Texts:
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
    precision: Literal["fp32", "bf16"] = "fp32",
    progress: str | None = None,
    texts: Texts | None = None,
) -> np.ndarray:
    """Pictures of `prompts`, B x H x W x 3 bytes; picture i starts from the noise of seed i.

    progress: the label of a progress bar, or None for no bar.
    texts: of this model with these weights, where several calls share prompts.
    """
    if len(prompts) != len(seeds):
        raise UserError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    refuse_size(model, size_hw)
    texts = texts or Texts(model)
    was_training = model.training
    model.eval()
    pictures = []
    with (
        torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"),
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
        prediction = _guided(model, z_in, t, cond, sampler)
        z_t = scheduler.step(prediction, t, z_t, return_dict=False, **step_options)[0]
    return z_t


def _condition(texts: Texts, prompts: Sequence[str], sampler: Sampler, size_hw: tuple[int, int]) -> Conditioning:
    """The conditioning of the prompts and, when there is guidance, of the negatives before them."""
    captions, dropped = list(prompts), [False] * len(prompts)
    if sampler.cfg != 1:
        captions = [sampler.negative] * len(prompts) + captions
        dropped = [not sampler.negative] * len(prompts) + dropped
    context_BLD, pooled_BP = texts(captions, dropped)
    time_ids = torch.tensor([(*size_hw, 0, 0, *size_hw)], dtype=torch.float32, device=context_BLD.device)
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
