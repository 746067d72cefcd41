"""Models that predict a flow or z0: their samplers, and that one which is not defined for them is refused."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from sdft.errors import UserError
from sdft.formats.diffusers_folder import write_folder
from sdft.rng import generator
from sdft.sampling.generate import generate
from sdft.sampling.samplers import FLOW_SCHEDULERS, NOT_FOR_Z0, SCHEDULERS, Sampler


def straight_to(z0: torch.Tensor, z_t: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
    """The flow of the line from z0 at t = 0 through z_t: (z_t - z0) / t."""
    return (z_t - z0) / t


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_a_perfect_flow_ends_at_the_picture(name: str, tiny_model) -> None:
    model = tiny_model()
    model.set_prediction_type("flow_prediction", False)
    scheduler = Sampler(name).scheduler(model)
    scheduler.set_timesteps(8)
    z0, z = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    for i, t in enumerate(scheduler.timesteps):
        flow = straight_to(z0, z, scheduler.sigmas[i])
        z = scheduler.step(flow, t, z, return_dict=False)[0]
    torch.testing.assert_close(z, z0, atol=2e-2, rtol=0)


def test_euler_takes_eulers_steps(tiny_model) -> None:
    """z + (t' - t) flow."""
    model = tiny_model()
    model.set_prediction_type("flow_prediction", False)
    scheduler = Sampler("euler").scheduler(model)
    scheduler.set_timesteps(4)
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1, 4, 8, 8, generator=g)
    by_hand = z.clone()
    assert scheduler.sigmas.tolist() == pytest.approx([0.999, 0.749, 0.5, 0.25, 0.0], abs=1e-3)
    for i, t in enumerate(scheduler.timesteps):
        flow = torch.randn(1, 4, 8, 8, generator=g)
        z = scheduler.step(flow, t, z, return_dict=False)[0]
        by_hand = by_hand + (scheduler.sigmas[i + 1] - scheduler.sigmas[i]) * flow
        torch.testing.assert_close(z, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in NOT_FOR_Z0])
def test_a_perfect_z0_ends_at_the_picture(name: str, tiny_model) -> None:
    model = tiny_model()
    model.set_prediction_type("sample", False)
    scheduler = Sampler(name).scheduler(model)
    scheduler.set_timesteps(8)
    z0, z = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    z = z * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scheduler.scale_model_input(z, t)
        z = scheduler.step(z0, t, z, return_dict=False)[0]
    torch.testing.assert_close(z, z0, atol=0.25, rtol=0)  # samplers that stop at the first noise level keep its noise


@pytest.mark.parametrize(
    ("prediction", "name"),
    [("flow_prediction", "heun"), ("flow_prediction", "ddim"), ("sample", "heun"), ("sample", "euler_a")],
)
def test_other_samplers_are_refused(prediction: str, name: str, tiny_model) -> None:
    model = tiny_model()
    model.set_prediction_type(prediction, False)
    with pytest.raises(UserError, match=rf"sampler\.name={name}: .*choose one of .*unipc"):
        Sampler(name).scheduler(model)


@pytest.mark.parametrize("prediction", ["flow_prediction", "sample"])
def test_diffusers_draws_the_same_from_the_exported_folder(prediction: str, tiny_model, tmp_path) -> None:
    model = tiny_model()
    model.set_prediction_type(prediction, False)
    write_folder(model, tmp_path / "model", torch.float32)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model")
    assert pipeline.scheduler.config.prediction_type == prediction
    sampler = Sampler("dpmpp_2m", steps=4)
    (ours,) = generate(model, ["a cat"], [3], sampler, (32, 32))
    pipeline.scheduler = sampler.scheduler(model)
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 32, "width": 32, "output_type": "np"}
    noise = torch.randn(1, 4, 8, 8, generator=generator(3, "sample noise"))
    (theirs,) = pipeline("a cat", latents=noise, **options).images
    assert abs(ours / 255 - theirs).max() < 0.02
