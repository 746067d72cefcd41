"""A loss or gradient that is NaN or infinite stops the run, and its samples are named."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from sdft.data.datamodule import Images
from sdft.errors import UserError
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.optimizers.optimizers import adamw
from sdft.optimizers.schedules import constant
from sdft.training.callbacks.guard import MOST_NAMED, Guard
from sdft.training.checkpoints import last_checkpoint
from sdft.training.trainer import trainer
from sdft.tuning.full import Full
from sdft.tuning.parameters import trainable_parameters


def fit(model, data, folder: Path, num: int = 3, lr_schedule=constant, resume: Path | None = None) -> Finetuning:
    module = Finetuning(model, Full(), Denoising(), partial(adamw, lr=1e-3), lr_schedule, seed=0)
    guards = [Guard(str(folder)), last_checkpoint(str(folder), every=1, keep=2)]
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "progress_bar": False, "run_dir": str(folder)}
    run = trainer(max_steps=num, callbacks=guards, accumulate_grad_batches=2, **settings)
    try:
        run.fit(module, data, ckpt_path=resume, weights_only=False)
    finally:
        fit.weights = {name: p.detach().clone() for name, p in trainable_parameters(module.model)}
    return module


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_broken_loss_stops_before_the_step_and_names_its_sample(
    wrong: float, tiny_model, tiny_source, tmp_path: Path
) -> None:
    data = Images(tiny_source(6), tiny_source(2, "held out"), batch_size=1, size=32, seed=3)
    model = tiny_model()
    encode = model.encode_moments
    spoilt = data.train_set.source.keys[4]

    def encode_moments(pixels):
        moments = encode(pixels)
        if len(pixels) == 6:  # all of the training pictures at once
            moments[4] = wrong
        return moments

    model.encode_moments = encode_moments
    with pytest.raises(UserError, match=rf"the loss became NaN or infinite at step \d with {spoilt}; .*resume="):
        fit(model, data, tmp_path)
    report = json.loads((tmp_path / "bad_samples.json").read_text())
    assert report["wrong"] == "loss"
    assert [sample["key"] for sample in report["samples"] if sample["loss"] == "nan"] == [spoilt]
    last = tmp_path / "checkpoints" / "last.ckpt"
    if report["step"]:
        saved = torch.load(last, weights_only=True)
        assert saved["global_step"] == report["step"]
        assert all(torch.equal(saved["state_dict"][f"model.{name}"], p) for name, p in fit.weights.items())
    assert all(torch.isfinite(p).all() for p in fit.weights.values())


def test_a_broken_gradient_stops_before_the_step_and_names_the_samples_of_it(
    tiny_model, tiny_source, tmp_path: Path
) -> None:
    """An infinite weight of samples is found in the gradient: their losses are reported without it."""

    class Heavy(tiny_source):
        def __getitem__(self, index: int):
            sample = super().__getitem__(index)
            return type(sample)(sample.key, sample.image, sample.caption, loss_weight=float("inf"))

    data = Images(Heavy(12), tiny_source(2, "held out"), batch_size=5, size=32, seed=3)
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.unet.named_parameters(prefix="unet")}
    with pytest.raises(UserError, match=r"the gradient became NaN or infinite at step 0 with .* and 2 more; "):
        fit(model, data, tmp_path)
    report = json.loads((tmp_path / "bad_samples.json").read_text())
    assert len(report["samples"]) == 10 == MOST_NAMED + 2  # two batches of five
    assert all(torch.equal(before[name], p) for name, p in fit.weights.items())
    assert not (tmp_path / "checkpoints").exists()


def slips(optimizer, num_steps: int) -> LambdaLR:
    """From the sixth step on, the rate is a thousand times what it was."""
    return LambdaLR(optimizer, lambda step: 1.0 if step < 6 else 1000.0)


def test_a_run_that_diverges_is_stopped_at_the_same_step_also_when_it_was_resumed(
    tiny_model, tiny_source, tmp_path: Path
) -> None:
    messages = {}
    for name, resume in (("straight", None), ("resumed", tmp_path / "straight" / "checkpoints" / "step_000006.ckpt")):
        data = Images(tiny_source(6), tiny_source(2, "held out"), batch_size=2, size=32, seed=3)
        with pytest.raises(UserError) as stopped:
            fit(tiny_model(), data, tmp_path / name, 40, slips, resume)
        messages[name] = str(stopped.value).replace(name, "")
        saved = torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        assert all(torch.equal(saved["state_dict"][f"model.{key}"], p) for key, p in fit.weights.items())
        assert all(p.isfinite().all() for p in fit.weights.values())
        assert saved["global_step"] == json.loads((tmp_path / name / "bad_samples.json").read_text())["step"] == 7
    assert messages["straight"] == messages["resumed"]
    pattern = r"the (loss|gradient) diverged to (\S+), (\d+) times the median of the last \d+, at step \d+ with noise.*"
    found = re.match(pattern + "raise callbacks.guard.divergence", messages["straight"])
    assert found, messages["straight"]
    assert int(found[3]) >= 100


def test_a_sound_run_leaves_no_list(tiny_model, tiny_source, tmp_path: Path) -> None:
    data = Images(tiny_source(6), tiny_source(2, "held out"), batch_size=2, size=32, seed=3)
    fit(tiny_model(), data, tmp_path)
    assert not (tmp_path / "bad_samples.json").exists()


def test_a_loss_that_had_almost_vanished_may_be_what_it_was_at_first(tmp_path: Path) -> None:
    """As that of pairs, which begins at log 2; above that it has diverged, also after a resume."""
    trainer = SimpleNamespace(global_step=3, global_rank=0, world_size=1, is_global_zero=True, precision="32-true")
    guard, resumed = Guard(str(tmp_path)), Guard(str(tmp_path))
    for value in (0.693, *[1e-4] * 9, 0.69):
        guard._look(trainer, "loss", torch.tensor(value))
    resumed.load_state_dict(guard.state_dict())
    for one in (guard, resumed):
        with pytest.raises(UserError, match=r"the loss diverged to 0\.7, 7000 times the median"):
            one._look(trainer, "loss", torch.tensor(0.7))
