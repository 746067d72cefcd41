"""The UNet's conditioning in training is that of diffusers in sampling: context, pooled vector, sizes and crops."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from sdft.batch import Batch, Conditioning
from sdft.data.images import plan_crop
from sdft.formats.diffusers_folder import SDXL_PARTS
from sdft.models.load import pretrained
from sdft.models.sdxl import SDXL, num_at_once, tokenize
from sdft.sampling.generate import generate
from sdft.sampling.samplers import Sampler

CAPTIONS = ["a red cat on a table", "a fairy tale forest at night, in the snow"]
LONG = "a red cat on the road at night in the snow near the castle " * 8


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request) -> SDXL:
    return pretrained("nano").to(request.param)


@pytest.fixture(scope="module")
def nano() -> SDXL:
    return pretrained("nano")


def pipeline_of(model: SDXL) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(**{part: getattr(model, part) for part in SDXL_PARTS}, add_watermarker=False)


def fake_batch(time_ids: list[tuple[int, ...]], dropped: tuple[int, ...] = ()) -> Batch:
    return Batch(
        keys=["a", "b"],
        visits=[0, 0],
        captions=CAPTIONS,
        dropped_B=torch.tensor([i in dropped for i in range(2)]),
        time_ids_B6=torch.tensor(time_ids, dtype=torch.float32),
        loss_weight_B=torch.ones(2),
        pixels_BCHW=torch.zeros(2, 3, 64, 64),
    )


def test_the_vae_takes_a_few_images_at_a_time(nano: SDXL, monkeypatch) -> None:
    """As many as have VAE_PIXELS pixels, so that memory does not grow with the batch; the results are the same."""
    assert num_at_once((1024, 1024)) == num_at_once((2048, 1024)) == 1
    assert num_at_once((512, 512)) == 4
    pixels = torch.rand(5, 3, 64, 32) * 2 - 1
    moments, taken = nano.encode_moments(pixels), []
    images = nano.decode(moments.chunk(2, dim=1)[0])
    monkeypatch.setattr("sdft.models.sdxl.VAE_PIXELS", 2 * 64 * 32)
    for network in (nano.vae.encoder, nano.vae.decoder):
        network.register_forward_pre_hook(lambda _, args: taken.append(len(args[0])))
    torch.testing.assert_close(nano.encode_moments(pixels), moments)
    torch.testing.assert_close(nano.decode(moments.chunk(2, dim=1)[0]), images)
    assert taken == [2, 2, 1, 2, 2, 1]


@pytest.mark.parametrize(
    ("original_hw", "target_hw", "flip", "time_ids"),
    [
        ((1000, 1500), (1024, 1024), False, (1000, 1500, 0, 256, 1024, 1024)),
        ((1000, 1000), (896, 1152), False, (1000, 1000, 128, 0, 896, 1152)),
        ((1003, 683), (1024, 1024), False, (1003, 683, 240, 0, 1024, 1024)),
        ((1000, 1500), (1024, 1024), True, (1000, 1500, 0, 256, 1024, 1024)),
    ],
)
def test_sizes_and_crops_by_hand(original_hw, target_hw, flip, time_ids) -> None:
    """The resized pictures are 1536x1024, 1152x1152 and 1024x1504; kohya crops along the other axis."""
    assert plan_crop(original_hw, target_hw, flip=flip).time_ids_6 == time_ids


def test_a_flip_mirrors_the_crop_that_is_not_in_the_centre() -> None:
    cut = plan_crop((1000, 1500), (1024, 1024), at=(0.0, 0.25))
    assert cut.time_ids_6 == (1000, 1500, 0, 128, 1024, 1024)
    assert plan_crop((1000, 1500), (1024, 1024), at=(0.0, 0.25), flip=True).time_ids_6[3] == 1536 - 128 - 1024


@torch.no_grad()
def test_the_conditioning_is_what_diffusers_makes_of_the_same_input(model: SDXL) -> None:
    sizes = [plan_crop((1003, 683), (1024, 1024)).time_ids_6, plan_crop((1000, 1500), (1024, 1024)).time_ids_6]
    cond = model.condition(fake_batch(sizes))
    pipeline = pipeline_of(model)
    context, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=False)
    assert torch.equal(cond.context_BLD, context)
    assert torch.equal(cond.pooled_BP, pooled)
    for ids, row in zip(sizes, cond.time_ids_B6, strict=True):
        width = model.text_encoder_2.config.projection_dim
        theirs = pipeline._get_add_time_ids(ids[:2], ids[2:4], ids[4:], torch.float32, width)
        assert row.tolist() == theirs[0].tolist()


@torch.no_grad()
def test_the_unet_answers_alike(model: SDXL) -> None:
    """The whole call: what `denoise` hands to the UNet against a call as the pipeline makes it."""
    cond = model.condition(fake_batch([(1003, 683, 240, 0, 64, 64), (1000, 1500, 0, 256, 64, 64)]))
    z_t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    ours = model.denoise(z_t, torch.tensor([7, 800]), cond)
    pipeline = pipeline_of(model)
    context, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": cond.time_ids_B6}
    theirs = model.unet(z_t.to(model.unet.dtype), torch.tensor([7, 800]), context, added_cond_kwargs=added).sample
    assert torch.equal(ours, theirs.float())


@torch.no_grad()
def test_sizes_reach_the_embedding_in_full_also_in_bf16(model: SDXL) -> None:
    """bf16 would read 683 as 684 and 1003 as 1004."""
    seen = []
    hook = model.unet.add_time_proj.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.autocast("cpu", torch.bfloat16):
        cond = model.condition(fake_batch([(1003, 683, 240, 1, 64, 64)] * 2))
        model.denoise(torch.zeros(2, 4, 16, 16), torch.tensor([1, 2]), cond)
    hook.remove()
    (given, embedded), *_ = seen
    assert given.dtype == embedded.dtype == torch.float32
    assert given[:6].tolist() == [1003, 683, 240, 1, 64, 64]


@torch.no_grad()
@pytest.mark.parametrize("empty_prompt", ["zeros", "empty"])
def test_a_dropped_caption_is_the_absent_negative_prompt(empty_prompt: str) -> None:
    model = pretrained("nano", empty_prompt=empty_prompt)
    cond = model.condition(fake_batch([(64, 64, 0, 0, 64, 64)] * 2, dropped=(1,)))
    pipeline = pipeline_of(model)
    pipeline.register_to_config(force_zeros_for_empty_prompt=empty_prompt == "zeros")
    context, negative, pooled, negative_pooled = pipeline.encode_prompt(CAPTIONS, device="cpu", negative_prompt=None)
    assert torch.equal(cond.context_BLD, torch.stack([context[0], negative[1]]))
    assert torch.equal(cond.pooled_BP, torch.stack([pooled[0], negative_pooled[1]]))
    assert (cond.context_BLD[1].abs().max() == 0) == (empty_prompt == "zeros")


@torch.no_grad()
@pytest.mark.parametrize("empty_prompt", ["zeros", "empty"])
def test_one_encoder_can_have_the_empty_prompt(empty_prompt: str) -> None:
    """Of the 128 channels of the context the first gives 48; the second gives the others and the pooled vector."""
    model = pretrained("nano", empty_prompt=empty_prompt)
    batch = fake_batch([(64, 64, 0, 0, 64, 64)] * 2)
    encoded, nothing = model.condition(batch), model.condition(fake_batch([(64, 64, 0, 0, 64, 64)] * 2, dropped=(0, 1)))
    batch.dropped_BE = torch.tensor([[True, False], [False, True]])
    cond = model.condition(batch)
    first = torch.cat([nothing.context_BLD[0, :, :48], encoded.context_BLD[0, :, 48:]], dim=-1)
    second = torch.cat([encoded.context_BLD[1, :, :48], nothing.context_BLD[1, :, 48:]], dim=-1)
    torch.testing.assert_close(cond.context_BLD, torch.stack([first, second]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cond.pooled_BP, torch.stack([encoded.pooled_BP[0], nothing.pooled_BP[1]]))
    assert not torch.equal(encoded.context_BLD, nothing.context_BLD)


def test_the_two_encoders_are_padded_differently(nano: SDXL) -> None:
    first, second = (tokenize(tokenizer, ["a cat"])[0, 0] for tokenizer, _ in nano.context_encoders)
    assert first.shape == second.shape == (77,)
    assert set(first[4:].tolist()) == {nano.tokenizer.eos_token_id}
    assert set(second[4:].tolist()) == {0}
    assert second[3] == nano.tokenizer_2.eos_token_id


@torch.no_grad()
def test_long_prompts_are_read_in_chunks_of_75_tokens() -> None:
    model = pretrained("nano", prompt_chunks=2)
    words = model.tokenizer(LONG, add_special_tokens=False).input_ids
    assert 75 < len(words) <= 150
    context, pooled = model.encode_prompts([LONG, "a cat"])
    assert context.shape == (2, 154, 128)
    first, second = (model.tokenizer.decode(words[:75]), model.tokenizer.decode(words[75:]))
    model.prompt_chunks = 1
    alone, alone_pooled = model.encode_prompts([first, second, "a cat", ""])
    assert torch.allclose(context[0], torch.cat([alone[0], alone[1]]), atol=1e-6)
    assert torch.allclose(context[1], torch.cat([alone[2], alone[3]]), atol=1e-6)
    assert torch.allclose(pooled, alone_pooled[[0, 2]], atol=1e-6)


def test_what_is_cut_off_is_said(nano: SDXL) -> None:
    with pytest.warns(UserWarning, match=r"75 of \d+ tokens.*model\.prompt_chunks=2"):
        nano.encode_prompts([LONG])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nano.encode_prompts(["a cat"])


def test_pictures_are_drawn_from_chunks_too() -> None:
    model = pretrained("nano", prompt_chunks=2)
    images = generate(model, [LONG, "a cat"], [0, 1], Sampler("euler", steps=2, negative="a dog"), (64, 64))
    assert images.shape == (2, 64, 64, 3)


@torch.no_grad()
def test_a_prompt_does_not_depend_on_its_neighbours(nano: SDXL) -> None:
    together, _ = nano.encode_prompts(CAPTIONS)
    alone, _ = nano.encode_prompts(CAPTIONS[:1])
    assert torch.allclose(together[:1], alone, atol=1e-6)
    assert isinstance(nano.condition(fake_batch([(64, 64, 0, 0, 64, 64)] * 2)), Conditioning)
