"""Samplers: diffusers' schedulers by the names that users know, on the noise schedule of the model."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import diffusers
import torch

from sdft.models.sdxl import SDXL
from sdft.objective.noise_schedule import NoiseSchedule
from sdft.types import Count, Fraction, NonNegative

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
