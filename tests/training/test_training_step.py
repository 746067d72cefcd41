"""The training step: it reduces the loss, accumulates, saves the trainable parameters, and resumes bit for bit."""

from __future__ import annotations

import ast
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from checks import assert_equal, slow

from sdft.data.datamodule import Images
from sdft.errors import UserError
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.objective.noise_schedule import NoiseSchedule
from sdft.objective.timesteps import UniformTimesteps
from sdft.objective.weighting import MinSNR
from sdft.optimizers import optimizers
from sdft.optimizers.optimizers import adamw
from sdft.optimizers.schedules import constant, cosine
from sdft.sampling.samplers import SCHEDULERS, Sampler
from sdft.training.callbacks.ema import EMA
from sdft.training.callbacks.guard import Guard
from sdft.training.checkpoints import last_checkpoint
from sdft.training.run import naming_checkpoint
from sdft.training.trainer import trainer
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full
from sdft.tuning.parameters import trainable_parameters

ROOT = Path(__file__).parents[2]
ALL_PARTS = ("unet", "text_encoder", "text_encoder_2")


def test_exactly_one_training_step_is_defined() -> None:
    """Every mode trains through the same step."""
    files = [*(ROOT / "sdft").rglob("*.py"), *ROOT.glob("*.py")]
    steps = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "training_step"
    ]
    assert len(steps) == 1, steps
    assert steps[0].startswith("sdft/module.py:")


@pytest.mark.parametrize("prediction", ["epsilon", slow("v_prediction")])
def test_one_picture_can_be_learned_by_heart(prediction: str, tiny_model, tiny_batch) -> None:
    """Four visits of one picture, each with its own noise and timestep, again and again: the loss falls below 5 %."""
    batch = tiny_batch(4, captions=["a red cat"], visits=[0, 1, 2, 3])
    batch.keys, batch.pixels_BCHW = ["one"] * 4, batch.pixels_BCHW[:1].expand(4, -1, -1, -1)
    module = Finetuning(tiny_model(), Full(), Denoising(prediction), partial(adamw, lr=4e-3), constant, seed=0)
    optimizer = module.build_optimizer()
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[0] > 0.3
    assert min(losses[-20:]) < 0.05 * losses[0]


def test_a_sample_has_the_weight_of_its_source(tiny_model, tiny_batch) -> None:
    """The step is the mean of weight times loss: with weights (2, 0) that is the first sample's loss."""
    module = Finetuning(tiny_model(), Full(), Denoising(), partial(adamw, lr=1e-3), constant, seed=0)
    with torch.no_grad():
        both = module.training_step(tiny_batch(2, loss_weights=[2.0, 0.0]), 0)
        first = module.training_step(tiny_batch(1), 0)
        plain = module.training_step(tiny_batch(2), 0)
    assert float(both) == pytest.approx(float(first), rel=1e-5)
    assert float(plain) != pytest.approx(float(first), rel=1e-3)


def test_a_dropped_caption_has_no_effect(tiny_model, tiny_batch) -> None:
    module = Finetuning(tiny_model(), Full(), Denoising(), partial(adamw, lr=1e-3), constant, seed=0)
    with torch.no_grad():
        losses = [
            [
                float(module.training_step(tiny_batch(1, dropped=dropped, captions=[caption]), 0))
                for caption in ("a cat", "dog")
            ]
            for dropped in ((0,), ())
        ]
    assert losses[0][0] == losses[0][1]
    assert losses[1][0] != losses[1][1]


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
def test_the_adapters_that_a_run_starts_from_follow_from_its_seed(method: str, tiny_model) -> None:
    """The state of torch's global generator does not matter; another seed gives other adapters."""
    starts = []
    for noise, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(noise)
        module = Finetuning(tiny_model(), Adapter(rank=2, method=method), Denoising(), adamw, constant, seed=seed)
        starts.append(torch.cat([p.detach().flatten() for _, p in trainable_parameters(module.model)]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]
)
def test_images_are_sampled_with_the_prediction_type_of_training(prediction: str, zero_snr: bool, tiny_model) -> None:
    """A model trained on v and sampled as epsilon generates noise, in previews, verdicts and exports."""
    objective = Denoising(prediction, zero_terminal_snr=zero_snr)
    module = Finetuning(tiny_model(), Full(), objective, adamw, constant, seed=0)
    for name in SCHEDULERS:
        scheduler = Sampler(name, steps=4).scheduler(module.model)
        assert scheduler.config.prediction_type == prediction
        if "rescale_betas_zero_snr" in scheduler.config:
            assert scheduler.config.rescale_betas_zero_snr == zero_snr
            sampled = scheduler.alphas_cumprod[[0, 500]].double()
            torch.testing.assert_close(sampled, NoiseSchedule(zero_snr).a[[0, 500]].square(), rtol=1e-4, atol=1e-6)
        scheduler.set_timesteps(4)
        if zero_snr:
            assert int(scheduler.timesteps[0]) == 999, f"{name} does not start where there is only noise"


def test_validation_compares_runs_of_different_objectives(tiny_model, tiny_source, tmp_path: Path) -> None:
    """The triples (image, timestep, noise) of `val/eps_mse` do not depend on the run's timestep distribution."""
    losses = []
    for timesteps in (UniformTimesteps(), UniformTimesteps(0.0, 0.1)):
        module = Finetuning(tiny_model(), Full(), Denoising(timesteps=timesteps), adamw, constant, seed=0)
        data = images(tiny_source(2), tiny_source(4, "held out"), cache="off")
        (metrics,) = settings(tmp_path, 1).validate(module, data, verbose=False)
        losses.append(metrics["val/eps_mse"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class Killed(Exception):
    """Stands for a kill: nothing after it runs."""


class KillAt(L.Callback):
    """Ends the process, as it were, when `step` optimiser steps are done, and a batch of the next one if it has two."""

    def __init__(self, step: int, accumulate: int = 2):
        self.step, self.accumulate = step, accumulate

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        if trainer.global_step == self.step and (i + 1) % self.accumulate == self.accumulate - 1:
            raise Killed


class Losses(L.Callback):
    """Keeps the loss of every batch."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        self.seen[i] = float(outputs["loss"])


def images(source, held_out, **options) -> Images:
    return Images(source, held_out, size=32, seed=3, **{"batch_size": 2, **options})


def settings(folder: Path, max_steps: int, *callbacks: L.Callback, **options) -> L.Trainer:
    return trainer(
        max_steps=max_steps,
        accelerator="cpu",
        devices=1,
        precision="32-true",  # auto is bf16 on CPUs that compute it
        progress_bar=False,
        callbacks=[*callbacks, last_checkpoint(str(folder), every=3)],
        run_dir=str(folder),
        **options,
    )


def read(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)


@pytest.mark.parametrize(("on_gpu", "asked", "used"), [(1, True, True), (1, False, False), (0, True, None)])
def test_a_gpu_uses_kernels_that_give_the_same_bits(on_gpu, asked, used, monkeypatch) -> None:
    """Those of a CPU always do; torch's switch would forbid some that are."""
    seen = {}
    monkeypatch.setattr("sdft.training.trainer.num_gpus", lambda _: on_gpu)
    monkeypatch.setattr("lightning.Trainer", lambda **given: seen.update(given))
    trainer(max_steps=1, deterministic=asked)
    assert seen["deterministic"] is used


def test_accumulation_is_a_larger_batch(tiny_model, tiny_source, tmp_path: Path) -> None:
    """2 x 4 and 8 x 1: the same samples, so the same mean loss and, up to float rounding, the same weights."""
    weights, losses = [], []
    for batch_size, accumulate in ((2, 4), (8, 1)):
        # eps keeps AdamW from turning the rounding of a vanishing gradient into a full step.
        optimizer = partial(adamw, lr=1e-2, eps=1e-4)
        module = Finetuning(tiny_model(), Full(), Denoising(weighting=MinSNR()), optimizer, constant, seed=0)
        data = images(tiny_source(6), tiny_source(2, "held out"), batch_size=batch_size, flip=True, caption_dropout=0.3)
        seen = Losses()
        settings(tmp_path / f"{batch_size}", 3, seen, accumulate_grad_batches=accumulate).fit(module, data)
        weights.append({name: p.detach() for name, p in trainable_parameters(module.model)})
        losses.append(torch.tensor(list(seen.seen.values())).view(3, accumulate).mean(1))
    # Lightning reports the loss it differentiates: that of a batch, divided by the number accumulated.
    torch.testing.assert_close(losses[0] * 4, losses[1], rtol=1e-4, atol=0)
    start = {name: p.detach() for name, p in tiny_model().named_parameters()}
    moved = max(float((p - start[name]).abs().max()) for name, p in weights[0].items())
    apart = max(float((p - weights[1][name]).abs().max()) for name, p in weights[0].items())
    assert moved > 1e-2
    assert apart < 1e-3 * moved


@pytest.mark.parametrize("tuning", ["full", "lora_unet_te_words"])
def test_checkpoints_hold_only_what_learns(tuning: str, tiny_model, tiny_source, tmp_path: Path) -> None:
    """The rest comes from `model.weights` again; optimiser and average have one entry per trainable tensor."""
    words = {"<sks>": "red cat"}
    chosen = Full() if tuning == "full" else Adapter(rank=2, parts=ALL_PARTS, new_words=words)
    module = Finetuning(tiny_model(), chosen, Denoising(), partial(adamw, lr=1e-3), constant, seed=0)
    settings(tmp_path, 3, EMA(0.9)).fit(module, images(tiny_source(4), tiny_source(2)))
    saved = read(tmp_path)
    names = [name for name, _ in trainable_parameters(module.model)]
    assert sorted(saved["state_dict"]) == sorted(f"model.{name}" for name in names)
    assert sum(len(group["params"]) for group in saved["optimizer_states"][0]["param_groups"]) == len(names)
    assert sorted(saved["callbacks"]["EMA"]["average"]) == sorted(names)
    assert "hyper_parameters" not in saved


@pytest.mark.parametrize(
    "tuning", ["full", "lora_unet_te_words", slow("loha"), slow("lokr"), slow("boft"), "oft_norms"]
)
def test_a_killed_and_resumed_run_ends_with_the_same_bits(tuning: str, tiny_model, tiny_source, tmp_path: Path) -> None:
    """Killed in the fifth of six steps, resumed from the third, with everything on that has a state.

    An average, caption dropout, flips, accumulation, a decaying rate, validation in between, and a permutation of the
    pictures that ends inside the run.
    """

    def new_module(chance: int) -> Finetuning:
        torch.manual_seed(chance)
        adapter = partial(Adapter, rank=2, alpha=4.0)
        chosen = {
            "full": Full,
            "lora_unet_te_words": partial(adapter, parts=ALL_PARTS, new_words={"<sks>": "red cat"}),
            "loha": partial(adapter, method="loha", layers="conv"),
            "lokr": partial(adapter, method="lokr"),
            "boft": partial(Adapter, rank=6, method="boft"),
            "oft_norms": partial(Adapter, rank=4, method="oft", train_norms=True, train_biases=True),
        }[tuning]()
        schedule = partial(cosine, warmup_steps=2, final=0.1)
        return Finetuning(
            tiny_model(), chosen, Denoising(weighting=MinSNR()), partial(adamw, lr=1e-2), schedule, seed=7
        )

    def fit(
        folder: Path, chance: int, *callbacks: L.Callback, resume: Path | None = None
    ) -> tuple[Finetuning, EMA, Losses]:
        module, average, losses = new_module(chance), EMA(0.9), Losses()
        data = images(tiny_source(5), tiny_source(2, "held out"), flip=True, caption_dropout=0.4)
        run = settings(folder, 6, average, losses, *callbacks, validate_every=2, accumulate_grad_batches=2)
        run.fit(module, data, ckpt_path=resume, weights_only=False)
        return module, average, losses

    straight, straight_average, straight_losses = fit(tmp_path / "straight", 1)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", 1, KillAt(4))
    assert read(tmp_path / "killed")["global_step"] == 3
    # Whatever the initial weights of the second process, the checkpoint's are used.
    checkpoint = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    resumed, resumed_average, resumed_losses = fit(tmp_path / "killed", 2, resume=checkpoint)

    assert list(resumed_losses.seen) == [6, 7, 8, 9, 10, 11]
    assert all(resumed_losses.seen[i] == straight_losses.seen[i] for i in resumed_losses.seen)
    assert straight_average.num_updates == resumed_average.num_updates == 6
    both = zip(trainable_parameters(straight.model), trainable_parameters(resumed.model), strict=True)
    for (name, a), (_, b) in both:
        assert torch.equal(a, b), name
        assert torch.equal(a, straight_average.average[name]), name  # the run ends with the average in place
    assert_same(read(tmp_path / "straight"), read(tmp_path / "killed"))


OPTIMIZERS = ("adamw_8bit", "adafactor", "lion", "came", "prodigy", "schedule_free_adamw", "muon", "sgd")


@pytest.mark.parametrize(
    ("optimizer", "dtype", "fused"),
    [(name, torch.float32, False) for name in OPTIMIZERS]
    + [("adamw", torch.bfloat16, False), ("adamw_8bit", torch.bfloat16, True), slow("adafactor", torch.float32, True)],
)
def test_every_optimizer_resumes_to_the_bit(optimizer, dtype, fused, tiny_model, tiny_source, tmp_path: Path) -> None:
    """Killed in the fifth of six steps, resumed from the third; also with weights in bf16 and a fused backward pass.

    Validation in between, at other steps than the saves, leaves no trace.
    """

    def fit(folder: Path, *callbacks: L.Callback, resume: Path | None = None, every: int = 2) -> dict[str, Any]:
        model = tiny_model()
        model.unet.to(dtype)
        build = partial(getattr(optimizers, optimizer), lr=1.0 if optimizer == "prodigy" else 1e-3)
        module = Finetuning(model, Full(), Denoising(), build, constant, seed=7, fused_backward=fused)
        data = images(tiny_source(5), tiny_source(2, "held out"), caption_dropout=0.4)
        run = settings(folder, 6, EMA(0.9), Guard(str(folder)), *callbacks, validate_every=every)
        run.fit(module, data, ckpt_path=resume, weights_only=False)
        return read(folder)

    straight = fit(tmp_path / "straight")
    with pytest.raises(Killed):
        fit(tmp_path / "killed", KillAt(4, accumulate=1))
    resumed = fit(tmp_path / "killed", resume=tmp_path / "killed" / "checkpoints" / "last.ckpt")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "Images"):
        assert_equal(straight[part], resumed[part], part)
    assert_equal(straight["callbacks"]["EMA"], resumed["callbacks"]["EMA"], "EMA")
    seldom = fit(tmp_path / "seldom", every=6)
    assert_equal(straight["state_dict"], seldom["state_dict"], "state_dict")
    start = dict(tiny_model().named_parameters())
    ended = {name.removeprefix("model."): p.float() for name, p in straight["state_dict"].items()}
    assert sum(not torch.equal(p, start[name]) for name, p in ended.items()) > 0.9 * len(ended)


def test_what_a_schedule_free_optimizer_averages_validates_and_stays(tiny_model, tiny_source, tmp_path: Path) -> None:
    """x of the paper, which is (y - 0.1 z) / 0.9, and not y, at which gradients are taken and checkpoints are saved."""
    seen: list[torch.Tensor] = []

    class Watch(L.Callback):
        def on_validation_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            seen.append(module.model.unet.conv_in.weight.detach().clone())

    build = partial(optimizers.schedule_free_adamw, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    module = Finetuning(tiny_model(), Full(), Denoising(), build, constant, seed=7)
    data = images(tiny_source(4), tiny_source(2, "held out"))
    settings(tmp_path, 6, EMA(0.9), Watch(), validate_every=6).fit(module, data)
    saved = read(tmp_path)
    y = saved["state_dict"]["model.unet.conv_in.weight"]
    params = [name for name, _ in trainable_parameters(module.model) if _.ndim > 1]
    z = saved["optimizer_states"][0]["state"][params.index("unet.conv_in.weight")]["z"]
    torch.testing.assert_close(seen[-1], (y - 0.1 * z) / 0.9, rtol=1e-4, atol=1e-6)
    assert torch.equal(module.model.unet.conv_in.weight, seen[-1])
    assert not torch.equal(y, seen[-1])


@pytest.mark.parametrize("offload", [False, True])
def test_the_average_of_bf16_weights_keeps_what_bf16_would_lose(offload, tiny_model, tiny_source, tmp_path) -> None:
    """It is in fp32, also through validations, and its place in memory does not matter."""
    averages = {}
    for every in (2, 6):
        model = tiny_model()
        model.unet.to(torch.bfloat16)
        module = Finetuning(model, Full(), Denoising(), partial(adamw, lr=1e-2), constant, seed=7)
        average = EMA(0.9, offload=offload)
        data = images(tiny_source(4), tiny_source(2, "held out"))
        settings(tmp_path / str(every), 6, average, validate_every=every).fit(module, data)
        averages[every] = average.average
        weight = module.model.unet.conv_in.weight
        assert torch.equal(weight, average.average["unet.conv_in.weight"].bfloat16())
    assert averages[2]["unet.conv_in.weight"].dtype == torch.float32
    assert_equal(averages[2], averages[6], "average")
    kept = averages[2]["unet.conv_in.weight"]
    assert not torch.equal(kept, kept.bfloat16().float())


def test_a_finished_run_with_more_steps_goes_on(tiny_model, tiny_source, tmp_path: Path) -> None:
    """Four steps, the last of which is saved as every third is, and two more are six."""

    def fit(folder: Path, max_steps: int, resume: Path | None = None) -> dict[str, Any]:
        module = Finetuning(tiny_model(), Adapter(rank=2), Denoising(), partial(adamw, lr=1e-2), constant, seed=7)
        run = settings(folder, max_steps, accumulate_grad_batches=2)
        run.fit(module, images(tiny_source(5), tiny_source(2, "held out")), ckpt_path=resume, weights_only=False)
        return read(folder)

    straight = fit(tmp_path / "straight", 6)
    assert fit(tmp_path / "longer", 4)["global_step"] == 4
    longer = fit(tmp_path / "longer", 6, tmp_path / "longer" / "checkpoints" / "last.ckpt")
    assert straight["global_step"] == longer["global_step"] == 6
    for part in ("state_dict", "optimizer_states", "Images"):
        assert_equal(straight[part], longer[part], part)


def assert_same(straight: dict[str, Any], resumed: dict[str, Any]) -> None:
    """The last checkpoints agree in live weights, average, optimiser and schedule."""
    assert straight["global_step"] == resumed["global_step"] == 6
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "Images"):
        assert_equal(straight[part], resumed[part], part)
    assert_equal(straight["callbacks"]["EMA"], resumed["callbacks"]["EMA"], "EMA")


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        (partial(Adapter, rank=2), Full),
        (Full, partial(Adapter, rank=2)),
        (partial(Adapter, rank=2), partial(Adapter, rank=4)),
        (partial(Adapter, rank=2), partial(Adapter, rank=2, layers="attention")),
    ],
    ids=["lora into full", "full into lora", "another rank", "other layers"],
)
def test_a_checkpoint_of_another_tuning_is_refused(saved, wanted, tiny_model, tiny_source, tmp_path: Path) -> None:
    def fit(tuning, resume: Path | None, max_steps: int) -> None:
        module = Finetuning(tiny_model(), tuning, Denoising(), partial(adamw, lr=1e-3), constant, seed=0)
        data = images(tiny_source(4), tiny_source(2))
        settings(tmp_path, max_steps).fit(module, data, ckpt_path=resume, weights_only=False)

    fit(saved(), None, 3)
    with pytest.raises(UserError, match=r"resume: .*same model, tuning and rank"):
        fit(wanted(), tmp_path / "checkpoints" / "last.ckpt", 6)


def test_a_checkpoint_with_other_parameter_groups_is_named() -> None:
    """As full tuning had before norms and biases had a group of their own."""
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    saved = optimizers.sgd([{"params": weights}], lr=1e-3).state_dict()
    now = optimizers.sgd([{"params": [weight]} for weight in weights], lr=1e-3)
    with (
        pytest.raises(UserError, match=r"resume=here: the checkpoint last.ckpt has other parameter groups"),
        naming_checkpoint("here", Path("last.ckpt")),
    ):
        now.load_state_dict(saved)


def test_the_average_is_what_validates_and_stays(tiny_model, tiny_source, tmp_path: Path) -> None:
    """After n steps the decay is min(0.5, (1 + n) / (10 + n)); worked by hand from the weights of each step."""
    module = Finetuning(tiny_model(), Full(), Denoising(), partial(adamw, lr=1e-2), constant, seed=0)
    name, weight = next(iter(trainable_parameters(module.model)))
    lives, validated, by_hand = [], [], weight.detach().clone()

    class Watch(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            lives.append(weight.detach().clone())

        def on_validation_batch_end(self, *_: Any) -> None:
            validated.append(weight.detach().clone())

    average = EMA(0.25)
    settings(tmp_path, 3, average, Watch(), validate_every=3).fit(module, images(tiny_source(4), tiny_source(2)))
    for n, live in enumerate(lives, start=1):
        decay = min(0.25, (1 + n) / (10 + n))  # 0.1818, 0.25, 0.25
        by_hand = decay * by_hand + (1 - decay) * live
    assert len(lives) == 3
    torch.testing.assert_close(average.average[name], by_hand)
    assert torch.equal(validated[0], average.average[name])
    assert torch.equal(weight, average.average[name])
    assert torch.equal(
        read(tmp_path)["state_dict"][f"model.{name}"], lives[-1]
    )  # the checkpoint goes on from the live ones
