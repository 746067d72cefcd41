"""Samplers: diffusers' schedulers by the names that users know, on the noise schedule of the model."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import diffusers
import torch

from sdft.errors import UserError, did_you_mean
from sdft.objective.noise_schedule import NoiseSchedule
from sdft.protocols import DiffusionModel
from sdft.types import BatchSize, Fraction, NonNegative, SamplerSteps

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
    # The singlestep solver: the scheduler that other programs use under this name needs torchsde, whose noise
    # depends on the whole batch.
    "dpmpp_sde": ("DPMSolverSinglestepScheduler", {**DPMPP_SDE, "lower_order_final": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
}
"""Name -> class of diffusers and its options. Prediction type and betas come from the model's own config."""
FLOW_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Its first order is Euler's step: see tests/sampling/test_flow.py.
    "euler": ("DPMSolverMultistepScheduler", {**DPMPP, "solver_order": 1}),
    "dpmpp_2m": SCHEDULERS["dpmpp_2m"],
    "dpmpp_2m_sde": SCHEDULERS["dpmpp_2m_sde"],
    "dpmpp_sde": SCHEDULERS["dpmpp_sde"],
    "unipc": SCHEDULERS["unipc"],
}
"""The same for models that predict a flow, of the schedulers that StableDiffusionXLPipeline can call."""
NOT_FOR_Z0 = ("euler_a", "heun")
"""Samplers whose classes in diffusers are not written for models that predict z0."""


class Sampler:
    """A diffusers scheduler and its settings.

    name: one of `SCHEDULERS`, or the dotted name of a scheduler class such as `diffusers.PNDMScheduler`, or of a
        function that builds a scheduler from the model's scheduler config. `heun` calls the model twice per step; `lcm`
        is for models distilled for it.
    steps: denoising steps.
    cfg: scale of classifier-free guidance; 1 is without guidance.
    negative: negative prompt; the model's empty prompt if empty.
    rescale: strength of guidance rescaling (Lin et al., arXiv:2305.08891, section 3.4); 0.7 for zero-SNR models.
    batch_size: images at a time; it does not change them beyond float rounding.

    Raises UserError for a name that does not exist.
    """

    def __init__(
        self,
        name: str = "euler",
        steps: SamplerSteps = 25,
        cfg: NonNegative = 5.0,
        negative: str = "",
        rescale: Fraction = 0.0,
        batch_size: BatchSize = 8,
    ):
        self._factory, self._options = find_scheduler(name)
        self.name, self.steps, self.cfg, self.negative = name, steps, cfg, negative
        self.rescale, self.batch_size = rescale, batch_size

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that build this sampler."""
        names = ("name", "steps", "cfg", "negative", "rescale", "batch_size")
        return {name: getattr(self, name) for name in names}

    def scheduler(self, model: DiffusionModel) -> Any:
        """A new diffusers scheduler on the model's noise schedule."""
        factory, options, config = self._factory, self._options, model.scheduler.config
        if not isinstance(factory, type):
            return factory(config)
        if self.name in SCHEDULERS:
            self._refuse_other_prediction(config.prediction_type)
            if config.prediction_type == "flow_prediction":
                class_name, options = FLOW_SCHEDULERS[self.name]
                return getattr(diffusers, class_name).from_config(config, **options, use_flow_sigmas=True)
        if config.rescale_betas_zero_snr and "rescale_betas_zero_snr" not in inspect.signature(factory).parameters:
            options = {**options, "trained_betas": zero_snr_betas()}
        return factory.from_config(config, **options)  # type: ignore[attr-defined]


    def with_timesteps(self, model: DiffusionModel) -> Any:
        """A new scheduler with the timesteps of its steps set. Raises UserError for steps that it cannot do."""
        scheduler = self.scheduler(model)
        try:
            scheduler.set_timesteps(self.steps, device=model.device)
        except ValueError as error:
            raise UserError(f"sampler.steps={self.steps}: {self.name} cannot do that ({error})") from error
        return scheduler

    def _refuse_other_prediction(self, prediction: str) -> None:
        flow, z0 = prediction == "flow_prediction", prediction == "sample"
        if (flow and self.name not in FLOW_SCHEDULERS) or (z0 and self.name in NOT_FOR_Z0):
            fitting = FLOW_SCHEDULERS if flow else [name for name in SCHEDULERS if name not in NOT_FOR_Z0]
            predicts = "a flow" if flow else "z0"
            raise UserError(
                f"sampler.name={self.name}: is not defined for a model that predicts {predicts}; "
                f"choose one of {', '.join(fitting)}"
            )


def find_scheduler(name: str, key: str = "sampler.name") -> tuple[Any, dict[str, Any]]:
    """(class or function, options) of a sampler by name.

    Raises UserError where there is none, in the name of the config key that holds it.
    """
    if name in SCHEDULERS:
        class_name, options = SCHEDULERS[name]
        return getattr(diffusers, class_name), options
    module, _, attribute = name.rpartition(".")
    try:
        factory = getattr(importlib.import_module(module), attribute) if module else None
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}={name}: cannot be imported ({error})") from error
    if factory is None or (isinstance(factory, type) and not issubclass(factory, diffusers.SchedulerMixin)):
        guess = did_you_mean(name, SCHEDULERS) or f"; choose one of {', '.join(SCHEDULERS)}"
        raise UserError(f"{key}={name}: is no sampler, and no dotted name of a diffusers scheduler{guess}")
    return factory, {}


def zero_snr_betas() -> list[float]:
    """Betas with zero terminal SNR, for schedulers without that option; 2^-24 is diffusers' bound on the signal."""
    signal = NoiseSchedule(zero_terminal_snr=True).a.square().clamp(min=2**-24)
    return (1 - signal / torch.cat([torch.ones(1), signal[:-1]])).tolist()
