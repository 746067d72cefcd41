"""Between two logged steps, the host reads nothing that a GPU is still computing."""

from __future__ import annotations

import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sdft.data.datamodule import Images
from sdft.errors import UserError
from sdft.formats.training_checkpoint import read_state
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.objective.noise import Offset
from sdft.objective.weighting import MinSNR
from sdft.optimizers.optimizers import adamw
from sdft.optimizers.schedules import constant
from sdft.training.callbacks.ema import EMA
from sdft.training.callbacks.guard import Guard
from sdft.training.callbacks.page import RunPage
from sdft.training.checkpoints import last_checkpoint
from sdft.training.lagged import LaggedScalar
from sdft.training.trainer import Progress, trainer
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full

WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
"""Operators whose result the host needs: a GPU would have to finish all that is queued."""
HOST = ("sdft/data/", "sdft/rng.py")
"""Code that works on tensors of the host, on GPUs too."""


class Waits(TorchDispatchMode):
    """Records from where the host reads values of tensors in the steps `first` to `last`."""

    def __init__(self) -> None:
        super().__init__()
        self.watching, self.found = False, list[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.watching and function in WAITS:
            frames = [frame.filename for frame in traceback.extract_stack()]
            if not any(part in name for name in frames for part in HOST):
                self.found.append(" < ".join(frames[-4:]))
        return function(*args, **(kwargs or {}))


class Steady(L.Callback):
    """Watches steps that are not logged, validated or saved."""

    def __init__(self, waits: Waits):
        self.waits = waits

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        self.waits.watching = 3 <= index < 7


@pytest.mark.parametrize("mode", ["lora", "full", "fused_bf16"])
@pytest.mark.parametrize("spoilt", [False, True])
def test_a_steady_step_reads_nothing_back(
    mode: str, spoilt: bool, tiny_model, tiny_source, tmp_path, monkeypatch
) -> None:
    """As on a GPU: fused kernels, and guard and progress one step behind. What `spoilt` reads is seen."""
    model, tuning = tiny_model(), Adapter(rank=2) if mode == "lora" else Full()
    if mode == "fused_bf16":
        model.unet.to(torch.bfloat16)
    monkeypatch.setattr("sdft.optimizers.optimizers.on_gpu", lambda groups: True)
    monkeypatch.setattr(Progress, "lags", True)
    guard, waits = Guard(str(tmp_path)), Waits()
    guard.lags = True
    if spoilt:
        monkeypatch.setattr(LaggedScalar, "read", lambda scalar: scalar._host.item())
    options = {"fused_backward": mode == "fused_bf16"}
    objective = Denoising(weighting=MinSNR())
    module = Finetuning(model, tuning, objective, partial(adamw, lr=1e-3), constant, seed=0, **options)
    data = Images(tiny_source(6), tiny_source(2, "held out"), batch_size=2, size=32, seed=3, caption_dropout=0.3)
    run = trainer(
        max_steps=9,
        accelerator="cpu",
        devices=1,
        precision="32-true",
        log_every=20,
        callbacks=[Steady(waits), EMA(0.9), guard, RunPage(str(tmp_path))],
        run_dir=str(tmp_path),
    )
    with waits:
        run.fit(module, data)
    if not spoilt:
        assert waits.found == []
    else:
        assert len(waits.found) >= 4


def test_a_guard_one_step_behind_names_the_step_and_lets_no_checkpoint_be_written(
    tiny_model, tiny_source, tmp_path: Path
) -> None:
    """The third step has a gradient that is NaN: its update is made, and then the run stops, before it is saved."""

    class Spoil(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if trainer.global_step == 2:
                module.model.unet.conv_in.weight.grad[0] = float("nan")

    guard = Guard(str(tmp_path))
    guard.lags = True
    module = Finetuning(tiny_model(), Full(), Denoising(), partial(adamw, lr=1e-3), constant, seed=0)
    data = Images(tiny_source(6), tiny_source(2, "held out"), batch_size=2, size=32, seed=3)
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "progress_bar": False, "run_dir": str(tmp_path)}
    saves = last_checkpoint(str(tmp_path), every=1, keep=1)
    run = trainer(max_steps=6, callbacks=[Spoil(), guard, saves], precision="32-true", **settings)
    with pytest.raises(UserError, match="the gradient became NaN or infinite at step 2 with "):
        run.fit(module, data)
    state = read_state(tmp_path / "checkpoints" / "last.ckpt")
    assert state["global_step"] == 2
    assert all(weight.isfinite().all() for weight in state["state_dict"].values())
    assert len(state["callbacks"]["Guard"]["recent"]["gradient"]) == 2


def test_a_scalar_is_what_it_was_when_it_was_launched() -> None:
    value = torch.tensor(2.5)
    lagged = LaggedScalar(value)
    value += 1
    assert lagged.read() == 2.5


class Unpinned(TorchDispatchMode):
    """Records what goes to the device, for which `meta` stands, other than by `hardware.send`."""

    def __init__(self) -> None:
        super().__init__()
        self.sent, self.found = 0, list[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = (kwargs or {}).get("device")
        if function is torch.ops.aten._to_copy.default and target == torch.device("meta") and args[0].device != target:
            stack = traceback.extract_stack()
            if any(frame.name == "send" for frame in stack):
                self.sent += 1
            else:
                self.found.append(" < ".join(f"{frame.filename}:{frame.lineno}" for frame in stack[-4:]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("spoilt", [False, True])
def test_what_a_step_draws_goes_to_the_device_from_pinned_memory(
    spoilt: bool, tiny_model, tiny_batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = Denoising(weighting=MinSNR(), noise=Offset(0.1))
    tuning = Adapter(rank=2, dropout=0.5)
    module = Finetuning(tiny_model(), tuning, objective, partial(adamw, lr=1e-3), constant, seed=0).to("meta")
    if spoilt:
        monkeypatch.setattr("sdft.objective.denoising.send", lambda tensor, device: tensor.to(device))
    moments = torch.zeros(4, 2 * module.model.latent_channels, 16, 16)
    batch = replace(tiny_batch(4), pixels_BCHW=None, moments_BCHW=moments)
    with Unpinned() as copies:
        module.training_step(batch.to("meta"), 0)
    assert bool(copies.found) == spoilt, copies.found
    assert copies.sent >= 5
