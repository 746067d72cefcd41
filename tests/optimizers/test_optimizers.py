"""Each optimizer by hand or against another implementation, its states, and which weights decay."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdft.config.command import compose
from sdft.errors import UserError
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.optimizers import optimizers as library
from sdft.optimizers.schedules import constant, cosine, refuse_schedule
from sdft.tuning.full import Full

LR, DECAY = 0.01, 0.1
NAMES = ("adamw", "adamw_8bit", "adafactor", "lion", "came", "prodigy", "schedule_free_adamw", "muon", "sgd")
WEIGHT = torch.linspace(-1, 1, 24).view(4, 6)
GRADIENT = torch.linspace(-1, 2, 24).view(4, 6).sin() + 0.01


def stepped(build: Callable[..., Any], gradients: list[Tensor], weight: Tensor = WEIGHT, **options: Any) -> Tensor:
    """A weight after a step with each gradient."""
    parameter = nn.Parameter(weight.clone())
    optimizer = build([{"params": [parameter], "lr_scale": 1.0}], lr=LR, **options)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_adamw_by_hand() -> None:
    first = WEIGHT * (1 - LR * DECAY) - LR * GRADIENT / (GRADIENT.abs() + 1e-8)
    torch.testing.assert_close(stepped(library.adamw, [GRADIENT], weight_decay=DECAY), first)


def test_adamw_in_8_bits_stays_close_to_adamw() -> None:
    """A hundred steps with noisy gradients; blocks of 256 share a scale."""
    noise = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=noise)
    gradients = [weight + torch.randn(64, 128, generator=noise) for _ in range(100)]
    ours, exact = (stepped(build, gradients, weight) for build in (library.adamw_8bit, library.adamw))
    moved = (exact - weight).square().mean().sqrt()
    assert 0 < (ours - exact).square().mean().sqrt() < 0.05 * moved


def test_lion_by_hand() -> None:
    momentum = 0.01 * GRADIENT
    first = WEIGHT * (1 - LR * DECAY) - LR * GRADIENT.sign()
    other = -3 * GRADIENT.flip(0)
    second = first * (1 - LR * DECAY) - LR * (0.98 * momentum + 0.02 * other).sign()
    torch.testing.assert_close(stepped(library.lion, [GRADIENT, other], weight_decay=DECAY), second)


def test_adafactor_by_hand() -> None:
    """The first decay is 0, so the moments are those of the one gradient; the update is clipped to an RMS of 1."""
    squares = GRADIENT.square() + 1e-30
    rows, columns = squares.mean(1), squares.mean(0)
    update = GRADIENT / (rows[:, None] * columns[None] / rows.mean()).sqrt()
    update = update / update.square().mean().sqrt().clamp(min=1.0)
    torch.testing.assert_close(stepped(library.adafactor, [GRADIENT]), WEIGHT - LR * update)


def test_came_by_hand() -> None:
    def factored(x: Tensor) -> Tensor:
        rows, columns = x.mean(1), x.mean(0)
        return rows[:, None] * columns[None] / rows.mean()

    update = GRADIENT / factored(0.001 * (GRADIENT.square() + 1e-30)).sqrt()
    update = update / update.square().mean().sqrt().clamp(min=1.0)
    momentum = 0.1 * update
    confidence = factored(0.0001 * ((update - momentum).square() + 1e-16)).sqrt()
    expected = WEIGHT - LR * momentum / confidence
    torch.testing.assert_close(stepped(library.came, [GRADIENT], weight_decay=0.0), expected)


def test_prodigy_finds_a_rate() -> None:
    """It begins with steps of 1e-6 and reaches the rate that a quadratic bowl of this size needs."""
    parameter = nn.Parameter(torch.ones(8, 8))
    optimizer = library.prodigy([{"params": [parameter], "lr_scale": 1.0}], weight_decay=0.0)
    sizes = []
    for _ in range(200):
        before = parameter.detach().clone()
        parameter.grad = parameter.detach().clone()
        optimizer.step()
        sizes.append(float((parameter.detach() - before).abs().max()))
    assert sizes[0] == pytest.approx(1e-6, rel=0.05)
    assert max(sizes) > 1e-2
    assert float(parameter.detach().abs().max()) < 0.2


def test_schedule_free_by_hand() -> None:
    """z makes the steps, x is the mean of the z, y = 0.1 z + 0.9 x is where gradients are taken (beta = 0.9)."""
    parameter = nn.Parameter(WEIGHT.clone())
    build = partial(library.schedule_free_adamw, lr=LR, betas=(0.9, 0.99), weight_decay=0.0)
    optimizer = build([{"params": [parameter], "lr_scale": 1.0}])
    z, x, second, y = WEIGHT, WEIGHT, torch.zeros_like(WEIGHT), WEIGHT
    for number in range(1, 4):
        torch.testing.assert_close(parameter.detach(), y)
        gradient = GRADIENT * number + y
        second = 0.99 * second + 0.01 * gradient.square()
        z = z - LR * gradient / ((second / (1 - 0.99**number)).sqrt() + 1e-8)
        x = x + (z - x) / number
        y = 0.1 * z + 0.9 * x
        parameter.grad = gradient
        optimizer.step()
    optimizer.eval()
    torch.testing.assert_close(parameter.detach(), x)


def test_muon_makes_matrices_orthogonal_and_leaves_vectors_to_adamw() -> None:
    noise = torch.Generator().manual_seed(0)
    for shape in ((16, 40), (8, 4, 3, 3)):
        weight, gradient = (torch.randn(shape, generator=noise) for _ in range(2))
        step = (stepped(library.muon, [gradient], weight, weight_decay=0.0) - weight).flatten(1)
        size = LR * 0.2 * max(step.shape) ** 0.5  # AdamW's, by arXiv:2502.16982
        values = torch.linalg.svdvals(step) / size
        assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    vector = torch.linspace(-1, 1, 9)
    adamw = stepped(library.adamw, [vector.cos()], vector, weight_decay=0.0)
    torch.testing.assert_close(stepped(library.muon, [vector.cos()], vector, weight_decay=0.0), adamw)


def test_muon_by_hand_in_fp32() -> None:
    gradient = torch.randn(12, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.ones_like(gradient)
    x = gradient.double().flatten(1)
    x = x / x.norm()
    for _ in range(5):  # the quintic iteration of Keller Jordan's Muon
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    step = stepped(library.muon, [gradient], weight, weight_decay=0.0) - weight
    # A millionth of the weights is their resolution; in bf16 the differences are a hundredth of the step.
    torch.testing.assert_close(step.flatten(1), (-LR * 0.2 * 36**0.5 * x).float(), atol=1e-6, rtol=1e-4)


def test_sgd_by_hand() -> None:
    first = WEIGHT - LR * (GRADIENT + 0.9 * GRADIENT)
    momentum = 0.9 * GRADIENT - GRADIENT.flip(0)
    second = first - LR * (-GRADIENT.flip(0) + 0.9 * momentum)
    torch.testing.assert_close(stepped(library.sgd, [GRADIENT, -GRADIENT.flip(0)]), second)


@pytest.mark.parametrize(
    ("name", "bytes_per_weight"),
    [
        ("adamw", 8),
        ("adamw_8bit", 2),
        ("adafactor", 0),
        ("lion", 4),
        ("came", 4),
        ("prodigy", 16),
        ("schedule_free_adamw", 8),
        ("muon", 4),
        ("sgd", 4),
    ],
)
def test_the_states_of_a_matrix(name: str, bytes_per_weight: int) -> None:
    parameter = nn.Parameter(torch.ones(512, 512))
    optimizer = getattr(library, name)([{"params": [parameter], "lr_scale": 1.0}], lr=LR)
    parameter.grad = torch.ones(512, 512)
    optimizer.step()
    kept = sum(t.nbytes for t in optimizer.state[parameter].values() if isinstance(t, Tensor))
    assert kept / parameter.numel() == pytest.approx(bytes_per_weight, abs=0.06)


@pytest.mark.parametrize("name", NAMES)
def test_norms_and_biases_do_not_decay(name: str, tiny_model) -> None:
    build = partial(getattr(library, name), lr=LR, weight_decay=DECAY)
    module = Finetuning(tiny_model(), Full(lr_scale={"unet": 0.5}), Denoising(), build, constant, seed=0)
    groups = module.build_optimizer().param_groups
    found = {p.ndim > 1: (group["weight_decay"], group["lr"]) for group in groups for p in group["params"]}
    assert found == {True: (DECAY, 0.5 * LR), False: (0.0, 0.5 * LR)}
    assert sum(len(group["params"]) for group in groups) == len(list(module.model.unet.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_chosen_and_has_a_rate_of_its_own(name: str) -> None:
    cfg = compose("train", ["experiment=dreamy_style", f"optimizer={name}"])
    factors = {"lion": 1 / 3, "came": 0.1, "schedule_free_adamw": 2, "muon": 2, "sgd": 1300, "prodigy": 1 / cfg.base_lr}
    assert cfg.base_lr == 1.5e-3
    assert cfg.optimizer.lr == pytest.approx(cfg.base_lr * factors.get(name, 1))
    assert compose("train", [f"optimizer={name}", "optimizer.lr=0.5"]).optimizer.lr == 0.5


def test_schedule_free_brings_its_schedule_and_refuses_another() -> None:
    cfg = compose("train", ["optimizer=schedule_free_adamw"])
    assert cfg.lr_schedule._target_ == "sdft.optimizers.schedules.constant"
    build = partial(library.schedule_free_adamw, lr=LR)
    refuse_schedule(build, constant)
    refuse_schedule(partial(library.adamw, lr=LR), cosine)
    for schedule in (cosine, partial(constant, warmup_steps=10)):
        with pytest.raises(UserError, match=r"averages the weights in place of a schedule; set lr_schedule=constant"):
            refuse_schedule(build, schedule)


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"optimizer=adamw_8bit: needs the package bitsandbytes; pip install"):
        library.adamw_8bit([{"params": [nn.Parameter(WEIGHT)]}], lr=LR)
