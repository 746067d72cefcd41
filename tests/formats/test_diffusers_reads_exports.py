"""Parity: exported files open in diffusers and give the same predictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from torch import Tensor, nn

from sdft.formats.adapter import words_of, write_lora, write_words
from sdft.formats.diffusers_folder import write_folder
from sdft.models.load import pretrained
from sdft.models.sdxl import SDXL
from sdft.tuning.adapter import Adapter

ALL_PARTS = ("unet", "text_encoder", "text_encoder_2")
CAPTIONS = ["a red cat", "a photo of the dog"]
TUNINGS = {
    "unet": {},
    "unet_attention": {"layers": "attention"},
    "unet_te": {"parts": ALL_PARTS},
    "dora": {"method": "dora"},
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 4e-3)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", TUNINGS)
def test_a_saved_lora_does_in_diffusers_what_it_does_here(
    name: str, dtype, tolerance: float, tiny_model, tmp_path
) -> None:
    """On the same base, with alpha 7 and rank 4, every adapter filled with numbers.

    The largest difference, in units of the largest change that the adapter makes: 1e-5 in fp32, which is float
    rounding; 4e-3 in fp16, since A and B are each rounded by up to 2^-11 = 4.9e-4 of themselves, in each of 84 layers.
    """
    base, live = tiny_model(), tiny_model()
    Adapter(rank=4, alpha=7.0, **TUNINGS[name]).attach(live)
    fill(live)
    path = tmp_path / "run" / "lora.safetensors"
    write_lora(live, path, dtype)

    pipeline = pipeline_of(base)
    untouched = outputs(base)
    pipeline.load_lora_weights(str(path))
    for part, ours, theirs, before in zip(
        ("context", "pooled", "unet"), outputs(live), outputs(base), untouched, strict=True
    ):
        change = float((ours - before).abs().max())
        if part == "unet" or name == "unet_te":
            assert change > 0.05 * float(before.abs().max()), part
            assert float((ours - theirs).abs().max()) <= tolerance * change, part
        else:
            assert torch.equal(ours, before), part
            assert torch.equal(theirs, before), part
    assert [file.name for file in path.parent.iterdir()] == ["lora.safetensors"]


def test_a_lora_file_has_its_alpha_and_every_adapter(tiny_model, tmp_path: Path) -> None:
    live = tiny_model()
    Adapter(rank=4, alpha=7.0, parts=ALL_PARTS).attach(live)
    write_lora(live, tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for part in ALL_PARTS:
        assert (config[f"{part}.r"], config[f"{part}.lora_alpha"]) == (4, 7.0)
        adapters = sum("lora_" in name for name, _ in live.get_submodule(part).named_parameters())
        assert sum(key.startswith(f"{part}.") for key in tensors) == adapters > 0
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_saving_leaves_the_live_model_alone(tiny_model, tmp_path: Path) -> None:
    live = tiny_model()
    Adapter(rank=4, parts=ALL_PARTS).attach(live)
    fill(live)
    before = outputs(live)
    write_lora(live, tmp_path / "lora.safetensors")
    write_lora(live, tmp_path / "lora.safetensors")  # over the first
    assert all(map(torch.equal, outputs(live), before))
    assert {p.dtype for p in live.parameters()} == {torch.float32}


def test_words_are_saved_bit_for_bit(tiny_model, tmp_path: Path) -> None:
    live = tiny_model()
    Adapter(rank=4, parts=ALL_PARTS, new_words={"<sks>": "red cat", "стиль": "neon lines"}).attach(live)
    write_words(words_of(live, ["<sks>", "стиль"]), tmp_path / "words.safetensors")
    with safe_open(tmp_path / "words.safetensors", "pt") as file:
        assert file.metadata()["words"].split("\n") == ["<sks>", "стиль"]
        assert sorted(file.keys()) == ["clip_g", "clip_l"]
        assert torch.equal(file.get_tensor("clip_l"), live.word_rows["clip_l"])
        assert torch.equal(file.get_tensor("clip_g"), live.word_rows["clip_g"])


def test_saved_words_and_lora_teach_a_fresh_diffusers_pipeline(tiny_model, tmp_path: Path) -> None:
    """The route of diffusers' own documentation: the rows by `load_textual_inversion`, then the adapters."""
    live, base = tiny_model(), tiny_model()
    Adapter(rank=4, parts=ALL_PARTS, new_words={"<sks>": "red cat"}).attach(live)
    fill(live)
    with torch.no_grad():
        for rows in live.word_rows.values():
            rows.add_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(9)))
    write_lora(live, tmp_path / "lora.safetensors", torch.float32)
    write_words(words_of(live, ["<sks>"]), tmp_path / "words.safetensors")

    pipeline = pipeline_of(base)
    with safe_open(tmp_path / "words.safetensors", "pt") as file:
        rows = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    pipeline.load_textual_inversion(rows["clip_l"], "<sks>", pipeline.tokenizer, pipeline.text_encoder)
    pipeline.load_textual_inversion(rows["clip_g"], "<sks>", pipeline.tokenizer_2, pipeline.text_encoder_2)
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    with torch.no_grad():
        ours = live.encode_prompts(["a <sks> dog"])
        context, _, pooled, _ = pipeline.encode_prompt("a <sks> dog", do_classifier_free_guidance=False)
    torch.testing.assert_close(context, ours[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, ours[1], rtol=1e-4, atol=1e-5)


class TestFolder:
    def test_what_is_written_is_read_back_bit_for_bit(self, tiny_model, tmp_path: Path) -> None:
        model = tiny_model(seed=3)
        write_folder(model, tmp_path / "model")
        assert_same_bits(pretrained(str(tmp_path / "model")), model)

    def test_so_is_nano(self, tmp_path: Path) -> None:
        nano = pretrained("nano")
        write_folder(nano, tmp_path / "model")
        assert_same_bits(pretrained(str(tmp_path / "model")), nano)

    def test_tokenizers_schedule_and_outputs_come_back(self, tiny_model, tmp_path: Path) -> None:
        model = tiny_model(seed=3)
        write_folder(model, tmp_path / "model")
        again = pretrained(str(tmp_path / "model"))
        for (one, _), (two, _) in zip(model.context_encoders, again.context_encoders, strict=True):
            options = {"padding": "max_length", "truncation": True}
            assert one(["a red cat", ""], **options).input_ids == two(["a red cat", ""], **options).input_ids
        assert public(model.scheduler.config) == public(again.scheduler.config)
        assert model.vae.config.scaling_factor == again.vae.config.scaling_factor == 0.5
        assert all(map(torch.equal, outputs(model), outputs(again)))

    def test_half_precision_is_rounded_once_and_the_model_stays(self, tiny_model, tmp_path: Path) -> None:
        model = tiny_model(seed=3)
        write_folder(model, tmp_path / "model", torch.float16)
        again = pretrained(str(tmp_path / "model"))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        for name, weight in again.state_dict().items():
            expected = model.state_dict()[name]
            assert torch.equal(weight, expected.half().float() if expected.is_floating_point() else expected), name

    @pytest.mark.parametrize("empty_prompt", ["zeros", "empty"])
    def test_what_a_dropped_caption_became_is_recorded_and_read_back(
        self, empty_prompt: str, tiny_model, tmp_path
    ) -> None:
        write_folder(tiny_model(empty_prompt=empty_prompt), tmp_path / "model")
        index = json.loads((tmp_path / "model" / "model_index.json").read_text())
        assert index["force_zeros_for_empty_prompt"] == (empty_prompt == "zeros")
        assert pretrained(str(tmp_path / "model")).empty_prompt == empty_prompt

    def test_it_replaces_an_older_folder_whole(self, tiny_model, tmp_path: Path) -> None:
        (tmp_path / "model" / "unet").mkdir(parents=True)
        (tmp_path / "model" / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").write_text("another run's")
        model = tiny_model(seed=3)
        write_folder(model, tmp_path / "model")
        assert [file.name for file in (tmp_path / "model" / "unet").glob("*00002*")] == []
        assert [file.name for file in tmp_path.iterdir()] == ["model"]
        assert_same_bits(pretrained(str(tmp_path / "model")), model)


def public(config) -> dict:
    """A diffusers config without its notes to itself."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def fill(model: nn.Module) -> None:
    """Every adapter tensor gets random numbers; B, which starts at zero, too."""
    g = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                p.copy_(0.15 * torch.randn(p.shape, generator=g))
            elif "magnitude" in name:
                p.mul_(1 + 0.1 * torch.rand(p.shape, generator=g))


def pipeline_of(model: SDXL) -> StableDiffusionXLPipeline:
    names = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    return StableDiffusionXLPipeline(**{name: getattr(model, name) for name in names}, add_watermarker=False)


@torch.no_grad()
def outputs(model: SDXL) -> tuple[Tensor, Tensor, Tensor]:
    """Context, pooled vector and prediction, straight from the parts, which a pipeline may have changed in place."""
    context, pooled = model.encode_prompts(CAPTIONS)
    z_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[40.0, 50, 1, 2, 32, 32]] * 2)}
    return context, pooled, model.unet(z_t, torch.tensor([700, 30]), context, added_cond_kwargs=added).sample


def assert_same_bits(a: SDXL, b: SDXL) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(weight, theirs[name]) and weight.dtype == theirs[name].dtype for name, weight in ours.items()
    )
