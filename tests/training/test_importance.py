"""The squared gradients that a run averages: by hand, with accumulation, over a kill, and into a merge."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file

from sdft.data.datamodule import Images
from sdft.errors import UserError
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.optimizers.optimizers import adamw
from sdft.optimizers.schedules import constant
from sdft.training.callbacks.importance import Importance
from sdft.training.checkpoints import last_checkpoint
from sdft.training.trainer import trainer
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full
from sdft.tuning.parameters import trainable_parameters

FILE = "importance.safetensors"


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


class Gradients(L.Callback):
    """Keeps the gradient of every step, and stops the run before step `kill`."""

    def __init__(self, kill: int | None = None):
        self.seen: list[dict[str, torch.Tensor]] = []
        self.kill = kill

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.kill:
            raise Killed
        self.seen.append({name: p.grad.clone() for name, p in trainable_parameters(module.model)})


@pytest.fixture
def fit(tiny_model, tiny_source, tmp_path: Path):
    """Trains two steps or more; returns the module and its folder."""

    def run(name: str, *callbacks: L.Callback, tuning=None, batch=(2, 2), steps: int = 2, **more):
        folder = tmp_path / name
        module = Finetuning(tiny_model(), tuning or Full(), Denoising(), partial(adamw, lr=1e-2), constant, seed=0)
        data = Images(tiny_source(5), tiny_source(2, "held out"), size=32, seed=3, batch_size=batch[0])
        chosen = [Importance(str(folder)), *callbacks, last_checkpoint(str(folder), every=1)]
        run = trainer(
            steps, accumulate_grad_batches=batch[1], accelerator="cpu", devices=1, progress_bar=False,
            precision="32-true", callbacks=chosen, run_dir=str(folder),
        )  # fmt: skip
        run.fit(module, data, weights_only=False, **more)
        return module, folder

    return run


def test_it_is_the_mean_of_squared_gradients_times_the_samples_of_a_step(fit) -> None:
    gradients = Gradients()
    module, folder = fit("run", gradients)
    found = load_file(folder / FILE)
    assert found.keys() == {f"unet/{name.removeprefix('unet.')}" for name, _ in trainable_parameters(module.model)}
    first, second = gradients.seen
    for name in first:
        by_hand = (4 * first[name] ** 2 + 4 * second[name] ** 2) / 2
        torch.testing.assert_close(found[name.replace("unet.", "unet/", 1)], by_hand, rtol=1e-5, atol=0)
    assert any(tensor.any() for tensor in found.values())


def test_it_does_not_depend_on_micro_batches(fit) -> None:
    whole, accumulated = (load_file(fit(f"{batch}", batch=batch, steps=1)[1] / FILE) for batch in ((4, 1), (1, 4)))
    for name, tensor in whole.items():
        torch.testing.assert_close(accumulated[name], tensor, rtol=1e-3, atol=1e-4 * float(tensor.max()))


def test_a_killed_and_resumed_run_measures_the_same_bits(fit, tmp_path: Path) -> None:
    straight = load_file(fit("straight", steps=3)[1] / FILE)
    with pytest.raises(Killed):
        fit("killed", Gradients(kill=2), steps=3)
    assert not (tmp_path / "killed" / FILE).exists()
    checkpoint = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    resumed = load_file(fit("killed", steps=3, ckpt_path=checkpoint)[1] / FILE)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


def test_weights_can_be_measured_without_moving_them(fit, tiny_model) -> None:
    """As `+tuning.lr_scale.unet=0` does."""
    module, folder = fit("frozen", tuning=Full(lr_scale={"unet": 0.0}))
    assert all(torch.equal(p, q) for p, q in zip(module.model.parameters(), tiny_model().parameters(), strict=True))
    assert load_file(folder / FILE)


def test_a_lora_has_none(fit) -> None:
    with pytest.raises(UserError, match=r"callbacks=importance: .* bake a LoRA .*merge=bake"):
        fit("lora", tuning=Adapter(rank=2))
