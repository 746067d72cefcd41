"""What a GPU must do: agree with the CPU, resume to the bit, compile, and train under every strategy.

`python -m pytest -m gpu`; left out where there is no GPU.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import EVERYTHING, KillAt, Run, assert_same_end, finish, result, start

from sdft.distributed.sharding import clip_gradients
from sdft.models.load import pretrained
from sdft.models.streaming import on_host
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.optimizers.optimizers import adamw
from sdft.optimizers.schedules import constant
from sdft.sampling.generate import generate
from sdft.sampling.samplers import Sampler
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full
from sdft.tuning.parameters import trainable_parameters

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TUNINGS = {"full": Full, "lora": partial(Adapter, rank=4), "dropout": partial(Adapter, rank=4, dropout=0.5)}


def loss_and_gradient(tuning: str, device: str, tiny_model, tiny_batch, precision: torch.dtype | None = None):
    module = Finetuning(tiny_model(), TUNINGS[tuning](), Denoising(), partial(adamw, lr=1e-3), constant, seed=0)
    module.to(device)
    with torch.autocast(device, precision, enabled=precision is not None):
        loss = module.training_step(tiny_batch(4).to(torch.device(device)), 0)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for _, p in trainable_parameters(module.model)])
    return loss.item(), gradient.cpu()


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_step_in_fp32_is_that_of_the_cpu(tuning: str, tiny_model, tiny_batch) -> None:
    """The same noise, timesteps and dropout: only the rounding differs."""
    loss, gradient = loss_and_gradient(tuning, "cuda", tiny_model, tiny_batch)
    expected_loss, expected = loss_and_gradient(tuning, "cpu", tiny_model, tiny_batch)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    assert (gradient - expected).norm() < 5e-3 * expected.norm()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_step_in_half_precision_is_near_that_of_the_cpu(precision: torch.dtype, tiny_model, tiny_batch) -> None:
    loss, gradient = loss_and_gradient("lora", "cuda", tiny_model, tiny_batch, precision)
    expected_loss, expected = loss_and_gradient("lora", "cpu", tiny_model, tiny_batch)
    assert loss == pytest.approx(expected_loss, rel=2e-2)
    assert torch.cosine_similarity(gradient, expected, dim=0) > 0.98


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("tuning", EVERYTHING)
def test_a_killed_and_resumed_run_ends_with_the_same_bits(tuning: str, precision: str, tmp_path: Path) -> None:
    options = {"tuning": tuning, "precision": precision, "accelerator": "gpu", **EVERYTHING[tuning]}
    straight = Run(tmp_path / "straight", **options)
    expected = result(straight)
    again = Run(tmp_path / "again", **options)
    assert_same_end(straight, again, expected, result(again))
    killed = Run(tmp_path / "killed", **options, callbacks=[KillAt(4)])
    assert finish(start(killed)) == [-9]
    resumed = Run(tmp_path / "killed", **options, resume=killed.last)
    assert_same_end(straight, resumed, expected, result(resumed))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_process_under_nccl_ends_like_one_without(strategy: str, tmp_path: Path) -> None:
    options = {"tuning": "full", "accelerator": "gpu", "export": True}
    expected = result(Run(tmp_path / "one", **options))["weights"]
    weights = result(Run(tmp_path / strategy, strategy=strategy, **options))["weights"]
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-5)


def test_a_compiled_unet_computes_the_same(tiny_model, tiny_batch) -> None:
    losses = []
    for compiled in (False, True):
        model = tiny_model().to("cuda")
        if compiled:
            model.unet.compile()
        module = Finetuning(model, Full(), Denoising(), partial(adamw, lr=1e-3), constant, seed=0)
        module.training_step(tiny_batch(4).to(torch.device("cuda")), 0).backward()
        losses.append(float(module.latest.mean_loss))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_images_are_those_of_the_cpu(tiny_model) -> None:
    sampler = Sampler("euler", steps=4, cfg=3.0, batch_size=2)
    images = [generate(tiny_model().to(d), ["a red cat", "a dog"], [1, 2], sampler, (32, 32)) for d in ("cpu", "cuda")]
    assert np.abs(images[0].astype(int) - images[1]).max() <= 2


def test_parts_wait_on_the_cpu_while_the_vae_works(tiny_model, monkeypatch) -> None:
    """`model.offload_idle`: the same images, and the UNet's frozen weights are elsewhere while they are decoded."""
    model = tiny_model().to("cuda")
    Adapter(rank=4).attach(model)
    sampler, seen = Sampler("euler", steps=2, cfg=1.0, batch_size=1), []
    expected = generate(model, ["a red cat"], [0], sampler, (32, 32))
    decode = model.vae.decode

    def watched(z):
        seen.append({(p.requires_grad, p.device.type) for p in model.unet.parameters()})
        return decode(z)

    monkeypatch.setattr(model.vae, "decode", watched)
    model.offload_idle = True
    assert np.array_equal(generate(model, ["a red cat"], [0], sampler, (32, 32)), expected)
    assert seen == [{(True, "cuda"), (False, "cpu")}]
    assert {p.device.type for p in model.parameters()} == {"cuda"}


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_streamed_blocks_compute_the_same_and_stay_on_the_host(tuning: str, tiny_batch) -> None:
    """`model.offload_blocks`: several steps, so that blocks are copied ahead while others compute."""
    losses, gradients = [], []
    for count in (0, "all"):
        model = pretrained("nano", gradient_checkpointing=True, offload_blocks=count)
        module = Finetuning(model, TUNINGS[tuning](), Denoising(), partial(adamw, lr=1e-3), constant, seed=0).cuda()
        optimizer = module.build_optimizer()
        for step in range(4):
            optimizer.zero_grad()
            module.training_step(tiny_batch(4).to(torch.device("cuda")), step).backward()
            clip_gradients([p for _, p in trainable_parameters(model)], 1.0)
            optimizer.step()
        losses.append(float(module.latest.mean_loss))
        gradients.append(torch.cat([p.grad.flatten().cpu() for _, p in trainable_parameters(model)]))
    assert {p.device.type for p in on_host(model)} == {"cpu"}
    assert all(p.is_pinned() for p in on_host(model))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
