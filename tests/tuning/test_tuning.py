"""Which weights are trained, and that no others change; the way back to the base; new words."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdft.batch import Batch, Conditioning
from sdft.errors import UserError
from sdft.formats.diffusers_folder import write_folder
from sdft.models.load import pretrained
from sdft.models.sdxl import SDXL, tokenize
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.optimizers.optimizers import adamw, scale_rates
from sdft.optimizers.schedules import constant
from sdft.sampling.generate import generate
from sdft.sampling.samplers import Sampler
from sdft.tuning.adapter import Adapter, adapters, scaled
from sdft.tuning.full import Full
from sdft.tuning.parameters import buffers_beside, trainable_parameters

ALL_PARTS = ("unet", "text_encoder", "text_encoder_2")
WORD = "стиль_Техноманта"
WORDS = {WORD: "glowing neon lines", "<sks>": "red cat"}
CAPTIONS = (f"a red cat, {WORD}", "a photo of the <sks> dog")
LAST_LAYER = "text_encoder.encoder.layers.2."  # the tiny encoder 1 has three layers

TUNINGS: dict[str, Callable[[], Full | Adapter]] = {
    "full": Full,
    "full_te": partial(Full, parts=ALL_PARTS),
    "lora_unet": partial(Adapter, rank=3),
    "lora_attention": partial(Adapter, rank=3, layers="attention"),
    "lora_unet_te": partial(Adapter, rank=3, parts=ALL_PARTS),
    "lora_unet_te_words": partial(Adapter, rank=3, parts=ALL_PARTS, new_words=WORDS),
    "dora_unet": partial(Adapter, rank=3, method="dora"),
    "dora_conv": partial(Adapter, rank=3, method="dora", layers="conv"),
    "lora_conv": partial(Adapter, rank=3, parts=ALL_PARTS, layers="conv"),
    "loha_unet": partial(Adapter, rank=3, method="loha", layers="conv"),
    "lokr_unet": partial(Adapter, rank=3, method="lokr", layers="conv"),
    "oft_unet": partial(Adapter, rank=3, method="oft", layers="conv"),
    "boft_te": partial(Adapter, rank=6, method="boft", parts=ALL_PARTS),
    "norms_te": partial(Adapter, rank=3, parts=ALL_PARTS, train_norms=True, train_biases=True),
}
MARKS = ("lora_", "hada_", "lokr_", "oft_")


def finetuning(model: SDXL, tuning, **options) -> Finetuning:
    return Finetuning(model, tuning, Denoising(), partial(adamw, lr=1e-2, **options), constant, seed=0)


def take_steps(module: Finetuning, batch: Batch, num_steps: int = 2) -> list[dict[str, Tensor]]:
    """Real optimiser steps; returns the gradients of each."""
    optimizer, gradients = module.build_optimizer(), []
    for _ in range(num_steps):
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        gradients.append({name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None})
        optimizer.step()
    return gradients


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def should_train(tuning: str, name: str) -> bool:
    """What each tuning promises to change, from the parameter's name alone."""
    unused = name.startswith((LAST_LAYER, "text_encoder.final_layer_norm"))
    return {
        "full": name.startswith("unet."),
        "full_te": name.startswith(tuple(f"{part}." for part in ALL_PARTS)) and not unused,
        "lora_unet_te": "lora_" in name,
        "lora_unet_te_words": "lora_" in name or name.endswith("rows_ND"),
        "lora_conv": "lora_" in name,
        "boft_te": "oft_" in name,
        "norms_te": "lora_" in name
        or ((name.endswith("base_layer.bias") or ("norm" in name and not name.startswith("vae."))) and not unused),
    }.get(tuning, name.startswith("unet.") and any(mark in name for mark in MARKS))


@pytest.mark.parametrize("name", TUNINGS)
def test_exactly_the_trainable_parameters_change(name: str, tiny_model, tiny_batch) -> None:
    """After two real steps every trainable tensor has other bits, and every other tensor the same."""
    module = finetuning(tiny_model(), TUNINGS[name]())
    before = snapshot(module.model)
    gradients = take_steps(module, tiny_batch(captions=CAPTIONS, visits=[0, 3]))
    after = snapshot(module.model)

    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key, _ in module.model.named_parameters() if should_train(name, key)}
    assert changed == {key for key, _ in trainable_parameters(module.model)}
    assert not any(key.startswith((LAST_LAYER, "text_encoder.final_layer_norm", "vae.")) for key in changed)
    touched = {key for step in gradients for key, gradient in step.items() if gradient.abs().max() > 0}
    assert touched == changed


@pytest.mark.parametrize("name", ["lora_unet", "lora_unet_te_words"])
def test_lora_a_gets_its_first_gradient_on_the_second_step(name: str, tiny_model, tiny_batch) -> None:
    """B starts at zero, and the gradient of A is B^T times something."""
    module = finetuning(tiny_model(), TUNINGS[name]())
    first, second = take_steps(module, tiny_batch(captions=CAPTIONS))
    of_a = [key for key in first if "lora_A" in key]
    assert len(of_a) == sum("lora_B" in key for key in first) > 0
    assert not any(first[key].any() for key in of_a)
    assert all(second[key].any() for key in of_a)
    assert all(first[key].any() for key in first if "lora_B" in key)


def test_full_text_encoders_have_gradients_through_the_pooled_vector_too(tiny_model, tiny_batch) -> None:
    """Encoder 2's last layer and projection reach the UNet only through the pooled vector."""
    module = finetuning(tiny_model(), Full(ALL_PARTS))
    (gradients,) = take_steps(module, tiny_batch(), num_steps=1)
    for name in ("text_encoder_2.text_projection.weight", "text_encoder_2.text_model.encoder.layers.1.mlp.fc2.weight"):
        assert gradients[name].abs().max() > 0


@pytest.mark.parametrize(
    ("name", "unet", "encoder_1", "encoder_2"),
    # Tiny: 7 transformers of (8 attention + 2 feed-forward + proj_in + proj_out); 2 of 3 and 2 of 2 encoder layers.
    [
        ("lora_unet", 84, 0, 0),
        ("lora_attention", 56, 0, 0),
        ("lora_unet_te", 84, 12, 12),
        ("lora_unet_te_words", 84, 12, 12),
        ("dora_unet", 84, 0, 0),
        # And 3 + 2 + 6 resnets of two convolutions, two downsamplers, two upsamplers.
        ("lora_conv", 110, 12, 12),
        ("loha_unet", 110, 0, 0),
        ("lokr_unet", 110, 0, 0),
        ("oft_unet", 110, 0, 0),
        ("boft_te", 84, 12, 12),
        ("norms_te", 84, 12, 12),
    ],
)
def test_number_of_adapters(name: str, unet: int, encoder_1: int, encoder_2: int, tiny_model) -> None:
    model = tiny_model()
    TUNINGS[name]().attach(model)
    assert [len(adapters(model.get_submodule(part))) for part in ALL_PARTS] == [unet, encoder_1, encoder_2]


def test_number_of_adapters_of_sdxl_itself() -> None:
    """722 modules in the UNet, 72 + 192 in the encoders, less the six of encoder 1's unused last layer."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        one = CLIPTextModel(CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=12))
        two = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=32))
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    model = SDXL(unet, AutoencoderKL(), one, two, None, None, None)
    every, attention = Adapter(rank=4, parts=ALL_PARTS).configs(model), Adapter(rank=4, layers="attention")
    assert len(every["unet"].target_modules) == 722
    assert len(attention.configs(model)["unet"].target_modules) == 560
    assert len(every["text_encoder"].target_modules) == 66
    assert len(every["text_encoder_2"].target_modules) == 192


@pytest.mark.parametrize("name", ["lora_unet", "lora_unet_te", "loha_unet", "lokr_unet", "oft_unet", "boft_te"])
def test_adapters_at_scale_zero_are_the_base_bit_for_bit(name: str, tiny_model, tiny_batch) -> None:
    batch, model = tiny_batch(), tiny_model()
    base = outputs(model, batch)
    module = finetuning(model, TUNINGS[name]())
    take_steps(module, batch)
    with scaled(model, 0.0):
        assert same_bits(outputs(model, batch), base)
    assert not same_bits(outputs(model, batch), base)


def test_an_untrained_adapter_is_the_base_bit_for_bit(tiny_model, tiny_batch) -> None:
    batch, model = tiny_batch(), tiny_model()
    base = outputs(model, batch)
    Adapter(rank=3, parts=ALL_PARTS).attach(model)
    assert same_bits(outputs(model, batch), base)


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr", "oft"])
def test_adapters_are_fp32_beside_a_bf16_base_and_change_nothing_untrained(method: str, tiny_model) -> None:
    """peft alone gives them bf16, in which small steps are lost; and DoRA's norms, if rounded, change the base."""
    model = tiny_model().to(torch.bfloat16)
    z_t, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)), torch.tensor([300])
    cond = Conditioning(torch.ones(1, 77, 40), torch.ones(1, 24), torch.ones(1, 6))
    with torch.no_grad():
        base = model.denoise(z_t, t, cond)
    Adapter(rank=3, method=method, layers="conv").attach(model)
    assert {p.dtype for _, p in trainable_parameters(model)} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    untrained = model.denoise(z_t, t, cond)
    assert torch.equal(untrained, base)
    untrained.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for _, p in trainable_parameters(model))


def test_no_adapter_is_ever_left_out_of_a_step(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft drops a LoHa or LoKr for a step where torch.rand gives 0, even at module_dropout 0."""
    for method in ("loha", "lokr"):
        model = tiny_model().train()
        Adapter(rank=3, method=method).attach(model)
        for _, p in trainable_parameters(model):
            nn.init.normal_(p)
        layer = model.unet.mid_block.attentions[0].proj_in
        x = torch.randn(4, layer.in_features)
        expected = layer(x)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "rand", lambda *size: torch.zeros(*size))
            assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "loha", "dropout": 0.1}, r"tuning\.dropout=0\.1: is not defined for tuning\.method=loha"),
        ({"method": "lokr", "dropout": 0.1}, r"tuning\.dropout=0\.1: is not defined for tuning\.method=lokr"),
        ({"layers": "conv", "parts": ["text_encoder"]}, r"tuning\.layers=conv: only the UNet has convolutions"),
    ],
)
def test_combinations_that_mean_nothing_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Adapter(rank=2, **options)


def test_half_scale_is_half_the_change(tiny_model) -> None:
    model = tiny_model()
    Adapter(rank=2, alpha=5.0).attach(model)
    layer = model.unet.mid_block.attentions[0].proj_in
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(0))
    base, change = layer.base_layer(x), 5.0 / 2 * layer.lora_B["default"](layer.lora_A["default"](x))
    torch.testing.assert_close(layer(x), base + change)
    with scaled(model, 0.5):
        torch.testing.assert_close(layer(x), base + 0.5 * change)
    torch.testing.assert_close(layer(x), base + change)


@pytest.mark.parametrize("name", TUNINGS)
def test_base_gives_the_base_and_brings_the_tuned_model_back(name: str, tiny_model, tiny_batch) -> None:
    """The base of new words is each word at the mean of its phrase, so it is measured after `attach`."""
    batch, model, tuning = tiny_batch(captions=CAPTIONS), tiny_model(), TUNINGS[name]()
    if name != "lora_unet_te_words":
        base = outputs(model, batch)
    module = finetuning(model, tuning)
    if name == "lora_unet_te_words":
        base = outputs(model, batch)
    take_steps(module, batch)
    tuned, weights = outputs(model, batch), snapshot(model)
    with tuning.base(model):
        assert same_bits(outputs(model, batch), base)
    assert same_bits(outputs(model, batch), tuned)
    assert not same_bits(tuned, base)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in snapshot(model).items())


@pytest.mark.parametrize("name", ["full", "lora_unet_te_words"])
def test_an_error_inside_base_leaves_the_tuned_model(name: str, tiny_model, tiny_batch) -> None:
    batch, model, tuning = tiny_batch(captions=CAPTIONS), tiny_model(), TUNINGS[name]()
    take_steps(finetuning(model, tuning), batch)
    tuned = outputs(model, batch)
    with pytest.raises(ZeroDivisionError), tuning.base(model):
        1 / 0  # noqa: B018
    assert same_bits(outputs(model, batch), tuned)


class TestLearningRates:
    def test_a_parts_rate_is_a_multiple_of_the_runs(self, tiny_model) -> None:
        model = tiny_model()
        scales = {"text_encoder": 0.2, "text_encoder_2": 0.1, "words": 5.0}
        tuning = Adapter(rank=2, parts=ALL_PARTS, new_words=WORDS, lr_scale=scales)
        tuning.attach(model)
        optimizer = scale_rates(adamw(tuning.groups(model), lr=1e-3))
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({"unet": 1e-3, "text_encoder": 2e-4, "text_encoder_2": 1e-4, "words": 5e-3})
        grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for _, p in trainable_parameters(model))

    def test_a_recipe_has_the_rate_of_words_of_a_run_without_any(self, tiny_model) -> None:
        model, tuning = tiny_model(), Adapter(rank=2, parts=ALL_PARTS, lr_scale={"words": 5.0})
        tuning.attach(model)
        assert {group["name"] for group in tuning.groups(model)} == set(ALL_PARTS)

    def test_rate_zero_stops_a_part(self, tiny_model, tiny_batch) -> None:
        module = finetuning(tiny_model(), Adapter(rank=2, parts=ALL_PARTS, lr_scale={"text_encoder": 0.0}))
        before = snapshot(module.model)
        take_steps(module, tiny_batch())
        after = snapshot(module.model)
        changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
        assert changed == {"unet", "text_encoder_2"}

    @pytest.mark.parametrize(
        "build",
        [
            partial(Full, lr_scale={"text_encoder": 0.1}),
            partial(Adapter, rank=2, lr_scale={"text_encoder": 0.1}),
            partial(Adapter, rank=2, lr_scale={"unett": 0.1}),
            partial(Adapter, rank=2, lr_scale={"words": 2.0}),
            partial(Adapter, rank=2, parts=("unet", "text_encoder"), lr_scale={"words": 2.0}),
        ],
    )
    def test_a_learning_rate_for_frozen_parts_is_refused(self, build: Callable) -> None:
        with pytest.raises(UserError, match=r"tuning.lr_scale names \['(text_encoder|unett|words)'\]"):
            build()


class TestNewWords:
    def test_each_is_one_token_of_both_tokenizers(self, tiny_model) -> None:
        model = tiny_model()
        sizes = [len(model.tokenizer), len(model.tokenizer_2)]
        caption = f"a <sks> dog, {WORD}"
        before = [tok(caption).input_ids for tok in (model.tokenizer, model.tokenizer_2)]
        Adapter(rank=2, parts=ALL_PARTS, new_words=WORDS).attach(model)
        for tok, size, pieces in zip((model.tokenizer, model.tokenizer_2), sizes, before, strict=True):
            assert len(tok) == size + 2
            ids = tok(caption).input_ids
            assert len(ids) < len(pieces)
            bos, a, sks, dog, comma, word, eos = ids
            assert (sks, word) == (size + 1, size)  # in the order of `new_words`
            assert (bos, a, dog, comma, eos) == (tok.bos_token_id, *tok("a dog,").input_ids[1:-1], tok.eos_token_id)

    def test_other_captions_are_tokenised_as_before(self, tiny_model) -> None:
        model, captions = tiny_model(), ["a red cat", "neon стиль lines", ""]
        before = [tokenize(tok, captions) for tok, _ in model.context_encoders]
        Adapter(rank=2, parts=ALL_PARTS, new_words=WORDS).attach(model)
        after = [tokenize(tok, captions) for tok, _ in model.context_encoders]
        assert all(map(torch.equal, before, after))

    def test_a_row_starts_as_the_mean_of_its_phrase(self, tiny_model) -> None:
        model = tiny_model()
        tables = [encoder.get_input_embeddings().weight for _, encoder in model.context_encoders]
        phrases = [tok("glowing neon lines").input_ids[1:-1] for tok, _ in model.context_encoders]
        Adapter(rank=2, parts=ALL_PARTS, new_words=WORDS).attach(model)
        assert list(model.word_rows) == ["clip_l", "clip_g"]
        for rows, table, ids, width in zip(model.word_rows.values(), tables, phrases, (16, 24), strict=True):
            assert rows.shape == (2, width)
            torch.testing.assert_close(rows[0], (table[ids[0]] + table[ids[1]] + table[ids[2]]) / 3)

    def test_rows_are_trained_and_the_table_is_not(self, tiny_model, tiny_batch) -> None:
        """Only the first word occurs in the captions: without weight decay only its row moves."""
        model = tiny_model()
        module = finetuning(model, Adapter(rank=2, parts=ALL_PARTS, new_words=WORDS), weight_decay=0.0)
        before = {name: rows.detach().clone() for name, rows in model.word_rows.items()}
        tables = [encoder.get_input_embeddings().table.weight.clone() for _, encoder in model.context_encoders]
        take_steps(module, tiny_batch(captions=CAPTIONS[:1]))
        for name, rows in model.word_rows.items():
            assert not torch.equal(rows[0], before[name][0])
            assert torch.equal(rows[1], before[name][1])
        for (_, encoder), table in zip(model.context_encoders, tables, strict=True):
            assert torch.equal(encoder.get_input_embeddings().table.weight, table)

    def test_the_pooled_vector_is_read_at_the_first_eos_behind_a_new_word(self, tiny_model, tmp_path: Path) -> None:
        """SDXL's own config has eos_token_id=2, which makes transformers read the largest id: the new word's."""
        write_folder(tiny_model(), tmp_path / "model")
        for encoder in ("text_encoder", "text_encoder_2"):
            config = tmp_path / "model" / encoder / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 2}))
        model = pretrained(str(tmp_path / "model"))
        Adapter(rank=2, parts=ALL_PARTS, new_words=WORDS).attach(model)
        ids = tokenize(model.tokenizer_2, [f"a {WORD} cat"])[:, 0]
        assert ids[0, :5].tolist().index(model.tokenizer_2.eos_token_id) == 4
        with torch.no_grad():
            last = model.text_encoder_2.text_model(ids).last_hidden_state  # after the final layer norm
            _, pooled = model.encode_prompts([f"a {WORD} cat"])
        torch.testing.assert_close(pooled[0], model.text_encoder_2.text_projection.weight @ last[0, 4])

    def test_without_the_encoders_they_are_refused(self) -> None:
        with pytest.raises(UserError, match="lora_unet_te"):
            Adapter(rank=2, parts=("unet",), new_words=WORDS)

    def test_an_empty_phrase_is_refused(self, tiny_model) -> None:
        with pytest.raises(UserError, match="'<sks>' is empty"):
            Adapter(rank=2, parts=ALL_PARTS, new_words={"<sks>": "  "}).attach(tiny_model())

    def test_a_word_inside_a_longer_one_is_not_cut_out_of_it(self, tiny_model) -> None:
        model = tiny_model()
        longer = [tok("a neon cat").input_ids for tok, _ in model.context_encoders]
        Adapter(rank=2, parts=ALL_PARTS, new_words={"neo": "red cat"}).attach(model)
        assert [tok("a neon cat").input_ids for tok, _ in model.context_encoders] == longer
        assert [len(tok("a neo cat").input_ids) for tok, _ in model.context_encoders] == [5, 5]

    @pytest.mark.parametrize(
        "words",
        [
            {"<|endoftext|>": "cat"},
            {"cat": "a red dog"},  # a word of the vocabulary
            {"a": "cat"},  # a letter of it
            {"phot": "cat"},  # what BPE knows as the beginning of `photo`, though the word itself is two tokens
            {"<sks>": "cat", "<SKS>": "dog"},  # the tokenizers read small letters
        ],
    )
    def test_a_word_that_would_get_no_row_of_its_own_is_refused(self, words: dict[str, str], tiny_model) -> None:
        with pytest.raises(UserError, match=r"tuning\.new_words"):
            Adapter(rank=2, parts=ALL_PARTS, new_words=words).attach(tiny_model())


@torch.no_grad()
def outputs(model: SDXL, batch: Batch) -> tuple[Tensor, ...]:
    """Context, pooled vector and prediction on fixed noise, of frozen weights: some CPUs have other kernels, and so
    other bits, for weights that need a gradient."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    model.requires_grad_(False)
    cond = model.condition(batch)
    z_t = torch.randn(len(batch), 4, 8, 8, generator=torch.Generator().manual_seed(5))
    found = cond.context_BLD, cond.pooled_BP, model.denoise(z_t, torch.full((len(batch),), 300), cond)
    for weight in trained:
        weight.requires_grad_(True)
    return found


def same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("prediction", ["sample", "flow_prediction", "v_prediction"])
def test_the_base_is_drawn_by_what_it_predicts(tiny_model, prediction: str) -> None:
    """A full fine-tune may change what is predicted; the model before it still predicts the noise."""
    model, sampler = tiny_model(), Sampler(steps=3)
    expected = generate(model, ["a red cat"], [0], sampler, (32, 32))
    optimizer = partial(torch.optim.SGD, lr=0.1)
    module = Finetuning(model, Full(["unet"]), Denoising(prediction=prediction), optimizer, constant, seed=0)
    with torch.no_grad():
        for p in model.unet.parameters():
            p.add_(0.01)
    with module.tuning.drawing_base(model):
        assert np.array_equal(generate(model, ["a red cat"], [0], sampler, (32, 32)), expected)
    assert model.scheduler.config.prediction_type == prediction


def test_a_checkpoint_has_the_statistics_of_a_trained_batch_normalisation(tiny_model) -> None:
    """They change in training as weights do. Those of a frozen one do not; scratch memory is in no checkpoint."""
    def normalised() -> Finetuning:
        model = tiny_model()
        model.unet.conv_out = nn.Sequential(model.unet.conv_out, nn.BatchNorm2d(4))
        model.vae.post_quant_conv = nn.Sequential(model.vae.post_quant_conv, nn.BatchNorm2d(4))
        model.unet.conv_out[1].register_buffer("scratch", torch.zeros(1), persistent=False)
        return finetuning(model, Full())

    trained, resumed = normalised(), normalised()
    plain = finetuning(tiny_model(), Full())
    trained.model.unet.conv_out(torch.randn(2, plain.model.unet.conv_out.in_channels, 4, 4))
    checkpoint = {"state_dict": trained.state_dict(), "loops": {}}
    trained.on_save_checkpoint(checkpoint)
    names = {name.removeprefix("model.unet.") for name in checkpoint["state_dict"]}
    kept = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert {name for name in names if "conv_out.1" in name} == {f"conv_out.1.{name}" for name in kept}
    assert not [name for name in names if "vae" in name]
    resumed.load_state_dict(checkpoint["state_dict"], strict=resumed.strict_loading)
    for one, other in zip(trained.model.unet.conv_out.buffers(), resumed.model.unet.conv_out.buffers(), strict=True):
        assert torch.equal(one, other)
    assert {name for name, _ in buffers_beside(plain.model)} == set()
