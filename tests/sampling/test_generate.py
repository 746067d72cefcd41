"""Pictures depend on their own prompt and seed, and are those that diffusers' own pipeline draws."""

from __future__ import annotations

import inspect
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from sdft.data.images import to_uint8
from sdft.errors import UserError
from sdft.models.sdxl import SDXL
from sdft.objective.noise_schedule import NoiseSchedule
from sdft.rng import generator
from sdft.sampling.generate import generate
from sdft.sampling.samplers import SCHEDULERS, Sampler

PROMPTS = ["a red cat", "a photo of the dog on a table", "neon lines"]
SIZE_HW = (32, 48)
ONE_STEP_OF_A_BYTE = 1
"""Another batch size sums floats in another order: about 1e-6, which can turn a pixel's rounding to bytes by one."""


@pytest.fixture(scope="module")
def model(tiny_model) -> SDXL:
    return tiny_model()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_named_sampler_draws_finite_pictures(name: str, model: SDXL) -> None:
    """Also with one step; bytes hide NaN as zero, so the latents' spread is looked at through the pixels."""
    for steps in (1, 5):
        pictures = generate(model, PROMPTS[:2], [0, 1], Sampler(name, steps=steps), SIZE_HW)
        assert (pictures.shape, pictures.dtype) == ((2, *SIZE_HW, 3), np.uint8)
        assert pictures.astype(float).std(axis=(1, 2, 3)).min() > 0.5
        assert not np.array_equal(pictures[0], pictures[1])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_picture_is_the_same_alone_and_in_a_batch(name: str, model: SDXL) -> None:
    seeds = [4, 7, 4]
    alone = np.concatenate(
        [generate(model, [p], [s], Sampler(name, 4), SIZE_HW) for p, s in zip(PROMPTS, seeds, strict=True)]
    )
    together = generate(model, PROMPTS, seeds, Sampler(name, 4, batch_size=3), SIZE_HW)
    turned = generate(model, PROMPTS[::-1], seeds[::-1], Sampler(name, 4, batch_size=2), SIZE_HW)[::-1]
    assert largest_difference(alone, together) <= ONE_STEP_OF_A_BYTE
    assert largest_difference(alone, turned) <= ONE_STEP_OF_A_BYTE


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_every_sampler_finds_what_a_perfect_model_knows(name: str, prediction: str, zero_snr: bool, tiny_model) -> None:
    """A model of a world with one picture, z0 = 0.5: its exact prediction leads from any noise to that picture."""
    model, schedule = tiny_model(), NoiseSchedule(zero_snr)
    model.set_prediction_type(prediction, zero_snr)

    def denoise(z_t, t_B, cond):
        t = np.interp(t_B.numpy().astype(float), np.arange(1000), (schedule.s / schedule.a).clamp(max=2**12).log())
        s = torch.tensor(np.exp(t) / np.sqrt(1 + np.exp(2 * t)))[:, None, None, None].float()
        a = (1 - s**2).sqrt().clamp(min=1e-6)
        eps = (z_t - a * 0.5) / s
        return eps if prediction == "epsilon" else a * eps - s * 0.5

    model.denoise = denoise
    pictures = generate(model, PROMPTS[:2], [0, 1], Sampler(name, steps=12, cfg=3.0), SIZE_HW)
    known = to_uint8(model.decode(torch.full((1, 4, 8, 12), 0.5)))
    assert largest_difference(pictures, np.repeat(known, 2, axis=0)) <= 3


def test_too_many_steps_for_a_sampler_are_an_error(model: SDXL) -> None:
    with pytest.raises(UserError, match=r"sampler\.steps=2000: lcm cannot do that"):
        generate(model, PROMPTS[:1], [0], Sampler("lcm", 2000), SIZE_HW)


def test_the_same_call_gives_the_same_bytes(model: SDXL) -> None:
    torch.manual_seed(1)
    first = generate(model, PROMPTS[:2], [0, 1], Sampler("euler_a", 4), SIZE_HW)
    torch.manual_seed(2)
    assert np.array_equal(generate(model, PROMPTS[:2], [0, 1], Sampler("euler_a", 4), SIZE_HW), first)


def test_seeds_and_prompts_and_negatives_matter(model: SDXL) -> None:
    sampler = Sampler("euler", 4)
    same, seed, prompt = generate(model, ["a red cat", "a red cat", "neon lines"], [0, 1, 0], sampler, SIZE_HW)
    (negative,) = generate(model, ["a red cat"], [0], Sampler("euler", 4, negative="the dog"), SIZE_HW)
    for other in (seed, prompt, negative):
        assert largest_difference(same, other) > 2


def test_guidance_off_does_not_look_at_the_negative(model: SDXL) -> None:
    plain = generate(model, PROMPTS[:2], [0, 1], Sampler("euler", 4, cfg=1.0), SIZE_HW)
    negative = generate(model, PROMPTS[:2], [0, 1], Sampler("euler", 4, cfg=1.0, negative="the dog"), SIZE_HW)
    guided = generate(model, PROMPTS[:2], [0, 1], Sampler("euler", 4, cfg=5.0), SIZE_HW)
    assert np.array_equal(plain, negative)
    assert largest_difference(plain, guided) > 2


@pytest.mark.parametrize("size_hw", [(32, 40), (33, 32), (8, 32)])
def test_a_size_that_the_unet_cannot_halve_is_refused(size_hw: tuple[int, int], model: SDXL) -> None:
    """The VAE halves twice and the UNet twice: multiples of 16."""
    with pytest.raises(UserError, match="must be multiples of 16"):
        generate(model, ["a"], [0], Sampler(steps=1), size_hw)


def test_each_prompt_needs_a_seed(model: SDXL) -> None:
    with pytest.raises(UserError, match="2 prompts but 1 seeds"):
        generate(model, PROMPTS[:2], [0], Sampler(steps=1), SIZE_HW)


def test_the_model_is_left_as_it_was(tiny_model) -> None:
    model = tiny_model()
    model.train()
    generate(model, ["a red cat"], [0], Sampler(steps=1), SIZE_HW)
    assert model.training
    model.eval()
    generate(model, ["a red cat"], [0], Sampler(steps=1), SIZE_HW)
    assert not model.training
    assert model.scheduler.config == tiny_model().scheduler.config


@pytest.mark.parametrize("empty_prompt", ["zeros", "empty"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("euler", {"cfg": 5.0}),
        ("euler", {"cfg": 1.0}),
        ("euler", {"cfg": 5.0, "negative": "the dog"}),
        ("euler", {"cfg": 5.0, "rescale": 0.7}),
        ("ddim", {"cfg": 5.0}),
        ("dpmpp_2m", {"cfg": 5.0}),
        ("unipc", {"cfg": 5.0}),
    ],
)
def test_parity_with_the_pipeline_of_diffusers(name: str, settings: dict, empty_prompt: str, tiny_model) -> None:
    """From the same noise, the same picture within one step of a byte; at least 99 % of them are equal.

    Without a negative prompt diffusers takes zeros with `force_zeros_for_empty_prompt` in its config, and the encoded
    empty string otherwise: our `zeros` and `empty`.
    """
    model, sampler, seeds = tiny_model(empty_prompt=empty_prompt), Sampler(name, 5, **settings), [3, 8]
    ours = generate(model, PROMPTS[:2], seeds, sampler, SIZE_HW)

    parts = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipeline = StableDiffusionXLPipeline(
        **{part: getattr(model, part) for part in parts},
        scheduler=sampler.scheduler(model),
        force_zeros_for_empty_prompt=empty_prompt == "zeros",
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS[:2],
        height=SIZE_HW[0],
        width=SIZE_HW[1],
        num_inference_steps=5,
        guidance_scale=sampler.cfg,
        guidance_rescale=sampler.rescale,
        negative_prompt=[sampler.negative] * 2 if sampler.negative else None,
        latents=torch.stack([torch.randn(4, 8, 12, generator=generator(seed, "sample noise")) for seed in seeds]),
        output_type="np",
    ).images
    theirs = (theirs * 255).round().astype(np.uint8)
    assert largest_difference(ours, theirs) <= ONE_STEP_OF_A_BYTE
    assert (ours == theirs).mean() > 0.99


def largest_difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_folder_gives_its_samplers_to_diffusers(name: str, model: SDXL, tmp_path: Path) -> None:
    """Who opens an exported folder and switches its scheduler gets the one that sdft draws with: diffusers' defaults of
    `clip_sample` change images by up to 130 of 255 levels."""
    model.scheduler.save_pretrained(tmp_path)
    ours = Sampler(name, steps=4).scheduler(model)
    kind, options = SCHEDULERS[name]
    chosen = {key: value for key, value in options.items() if key not in ("clip_sample", "set_alpha_to_one")}
    theirs = getattr(diffusers, kind).from_config(getattr(diffusers, kind).load_config(tmp_path), **chosen)
    known = set(inspect.signature(type(ours)).parameters)
    assert {key: ours.config[key] for key in known} == {key: theirs.config[key] for key in known}
