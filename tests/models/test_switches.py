"""Attention, checkpointing, memory order and compilation change speed and memory, not the loss or its gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checks import long
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from sdft.batch import Batch
from sdft.errors import UserError
from sdft.models.load import pretrained
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.objective.preference import Preference
from sdft.optimizers.optimizers import adamw
from sdft.optimizers.schedules import constant
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full

MODES: dict[str, Callable] = {
    "full": Full,
    "lora_unet": lambda: Adapter(rank=4),
    "lora_unet_te": lambda: Adapter(rank=4, parts=("unet", "text_encoder", "text_encoder_2")),
}


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        keys=["a", "b"],
        visits=[0, 0],
        captions=["a red cat", "a castle at night"],
        dropped_B=torch.tensor([False, True]),
        time_ids_B6=torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2),
        loss_weight_B=torch.ones(2),
        moments_BCHW=torch.randn(2, 8, 16, 16, generator=generator),
    )


def step(mode: str, **switches) -> tuple[Tensor, Tensor]:
    """Loss and gradients of one training step."""
    module = Finetuning(pretrained("nano", **switches), MODES[mode](), Denoising(), adamw, constant, seed=0)
    module.log_dict = module.log = lambda *_, **__: None
    with torch.no_grad():
        for name, p in module.model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.01)
    loss = module.training_step(batch(), 0)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad])


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple[Tensor, Tensor]]:
    """The step of each mode without any switch."""
    return {mode: step(mode) for mode in MODES}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "switches",
    [{"gradient_checkpointing": True}, {"channels_last": True}, {"attention": "eager"}, {"attention": "sliced"}],
    ids=lambda switches: "=".join(map(str, *switches.items())),
)
def test_the_step_is_the_same_in_every_mode(mode: str, switches: dict, plain) -> None:
    loss, gradients = plain[mode]
    other_loss, other_gradients = step(mode, **switches)
    assert torch.allclose(loss, other_loss, rtol=1e-5)
    assert (gradients - other_gradients).norm() < 1e-4 * gradients.norm()


def test_compile_marks_the_unet_or_its_transformer_blocks() -> None:
    for compile, whole, blocks in ((False, 0, 0), (True, 1, 0), ("full", 1, 0), ("blocks", 0, 11)):
        unet = pretrained("nano", compile=compile).unet
        compiled = [m for m in unet.modules() if m._compiled_call_impl is not None]
        assert (unet in compiled, len([m for m in compiled if type(m) is BasicTransformerBlock])) == (whole, blocks)


@pytest.mark.slow
@pytest.mark.parametrize("how", [long("compile"), "compile_repeated_blocks"])
def test_a_compiled_unet_answers_alike_with_adapters_that_came_later(how: str, tiny_model, tiny_batch) -> None:
    """Compiling nano takes minutes, so a smaller model stands in."""
    predictions = []
    for compiled in (False, True):
        model = tiny_model()
        if compiled:
            getattr(model.unet, how)()
        torch.manual_seed(0)
        Adapter(rank=2).attach(model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.fill_(0.05)
            batch = tiny_batch()
            z_t = torch.ones(2, 4, 8, 8)
            predictions.append(model.denoise(z_t, torch.tensor([7, 800]), model.condition(batch)))
    apart = (predictions[0] - predictions[1]).norm() / predictions[0].norm()
    assert apart < 1e-4


def test_what_learns_must_be_fp32_or_bf16() -> None:
    with pytest.raises(UserError, match=r"model\.dtype\.unet is torch\.float16, .* set it to fp32 or bf16"):
        step("full", dtype={"unet": "fp16"})


@pytest.mark.parametrize("mode", ["lora_unet", "lora_unet_te"])
def test_adapters_are_fp32_beside_a_base_in_bf16(mode: str, plain) -> None:
    frozen = {"unet": "bf16", "text_encoder": "bf16", "text_encoder_2": "bf16"}
    loss, gradients = plain[mode]
    other_loss, other_gradients = step(mode, dtype=frozen)
    assert other_gradients.dtype == torch.float32
    assert torch.allclose(loss, other_loss, rtol=0.05)
    assert torch.nn.functional.cosine_similarity(gradients, other_gradients, dim=0) > 0.98


@pytest.mark.parametrize(("zero_snr", "remedy"), [(False, "objective=v"), (True, "objective=v_zero_snr")])
def test_weights_that_predict_v_are_not_trained_as_epsilon(zero_snr: bool, remedy: str) -> None:
    model = pretrained("nano")
    model.set_prediction_type("v_prediction", zero_snr)
    with pytest.raises(UserError, match=f"the weights predict v; choose {remedy}$"):
        Finetuning(model, Full(), Denoising(), adamw, constant, seed=0)
    if zero_snr:
        with pytest.raises(UserError, match="choose objective=v_zero_snr"):
            Finetuning(model, Full(), Denoising("v_prediction"), adamw, constant, seed=0)


def test_pairs_are_not_trained_as_another_prediction() -> None:
    """The remedy is another prediction of the same objective: objective=v would not learn from pairs."""
    model = pretrained("nano")
    model.set_prediction_type("v_prediction", False)
    message = r"objective\.prediction=epsilon: the weights predict v; set objective\.prediction=v_prediction$"
    with pytest.raises(UserError, match=message):
        Finetuning(model, Adapter(rank=2), Preference(), adamw, constant, seed=0)
