"""dry_run=true: the memory and FLOPs of a run, against values computed by hand or measured in a real step."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import train
from sdft.data.datamodule import Images
from sdft.errors import UserError
from sdft.models.load import pretrained, pretrained_on_meta
from sdft.models.streaming import on_host, streams
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.optimizers.optimizers import adafactor, adamw, adamw_8bit
from sdft.optimizers.schedules import constant
from sdft.planning.allocations import AllocationTracker
from sdft.planning.footprint import MemoryNeeds, MetaBuild, Setup, memory_needs
from sdft.planning.preflight import Preflight, refuse_batch
from sdft.planning.updates import tensors_of, update_memory
from sdft.rng import Draws
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full
from sdft.tuning.parameters import trainable_parameters

MIB = 2**20
PLAIN = Setup(max_steps=10, accumulate=1, precision="32-true", num_devices=1, num_shards=1, on_gpu=False)


@pytest.fixture
def setting(tiny_model, tiny_source):
    """Builds a module and its data: `setting(tuning, on_meta=True, checkpointing=False, batch_size=2)`."""

    def build(tuning, on_meta: bool = True, checkpointing: bool = False, batch_size: int = 2):
        data = Images(tiny_source(6), tiny_source(2, "held out"), batch_size, size=32, cache="off")
        model = tiny_model().to("meta") if on_meta else tiny_model()
        if checkpointing:
            model.unet.enable_gradient_checkpointing()
        with MetaBuild():
            return Finetuning(model, tuning, Denoising(), partial(adamw, lr=1e-3), constant, seed=0), data

    return build


def test_the_tracker_counts_live_bytes_and_flops() -> None:
    known = torch.nn.Linear(4, 4)
    with AllocationTracker(known) as ledger:
        a = torch.zeros(256)  # 1024 bytes
        b = a + 1  # 2048 together
        del a
        c = torch.zeros(512)  # 3072
        del b
        c.view(2, 256).add_(1)  # a view and a change in place add nothing
        known.weight.t()
        assert (ledger.now, ledger.peak, ledger.flops) == (2048, 3072, 0)
        torch.zeros(2, 3) @ torch.zeros(3, 4)
    assert ledger.flops == 2 * 2 * 3 * 4
    assert ledger.peak == 3072


def test_adamw_keeps_two_copies_and_needs_one_for_a_moment(setting) -> None:
    module, _ = setting(Full())
    kept, moment = update_memory(module, (512, 512), torch.float32, on_gpu=False)
    assert kept == pytest.approx(2 * 2**20, abs=8)  # and the number of the step
    assert 1.0 <= moment / 2**20 <= 1.1
    assert update_memory(module, (512, 512), torch.float32, on_gpu=True)[1] < 2**12, "fused kernels need no more"
    assert update_memory(module, (4096, 512), torch.float32, on_gpu=False)[0] == pytest.approx(8 * kept, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "dtype", "fused"),
    [
        (adamw, torch.float32, True),
        (adamw, torch.bfloat16, False),
        (adamw_8bit, torch.bfloat16, True),
        (adafactor, torch.bfloat16, True),
    ],
)
def test_the_forecast_of_an_optimizer_is_what_it_takes(optimizer, dtype, fused, thin_sdxl, tiny_source) -> None:
    """On thin SDXL: states to 2 %, the peak of a step with its update to 10 %, against counted bytes."""

    def setting(on_meta: bool) -> tuple[Finetuning, Images]:
        load = pretrained_on_meta if on_meta else pretrained
        model = load(str(thin_sdxl.weights), str(thin_sdxl.config), gradient_checkpointing=True)
        model.unet.to(dtype)
        data = Images(tiny_source(6), tiny_source(2, "held out"), 2, size=64, cache="off")
        with MetaBuild() if on_meta else nullcontext():
            build = partial(optimizer, lr=1e-3)
            return Finetuning(model, Full(), Denoising(), build, constant, seed=0, fused_backward=fused), data

    needs = memory_needs(*setting(on_meta=True), PLAIN, 0)
    module, data = setting(on_meta=False)
    built, batch = module.build_optimizer(), next(iter(data.val_dataloader()))

    @torch.enable_grad()  # as Lightning's closure: Adafactor's step does not
    def closure() -> None:
        module.objective(module.model, batch, Draws(0, batch.keys, batch.visits)).per_sample_B.mean().backward()

    built.step(closure)
    states = tensors_of(built)
    assert needs.states == pytest.approx(sum(t.nbytes for t in states), rel=0.02)
    for p in module.model.unet.parameters():
        if not fused:
            p.grad = torch.zeros_like(p)
    ledger = AllocationTracker(module.model, tensors=states)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), ledger:
        built.step(closure)
    if not fused:  # weights in bf16 are replaced by new ones
        assert max(needs.step, needs.update) == pytest.approx(ledger.peak, rel=0.1)
        return
    assert needs.gradients == 0
    assert needs.step == pytest.approx(ledger.peak, rel=0.1)


@pytest.mark.slow
def test_weights_gradients_states_and_average_by_hand(setting) -> None:
    module, data = setting(Full())
    unet = 4 * sum(p.numel() for p in module.model.unet.parameters())
    whole = 4 * sum(p.numel() for p in module.model.parameters())
    found = memory_needs(module, data, PLAIN, num_averages=1)
    ids = 2 * 77 * 8  # the one buffer of each encoder
    assert found.weights == whole + ids
    steps = 4 * len(list(module.model.unet.parameters()))  # AdamW counts them for each weight
    assert (found.gradients, found.states, found.average) == (unet, 2 * unet + steps, unet)
    sharded = memory_needs(*setting(Full()), PLAIN.__class__(**{**PLAIN.__dict__, "num_shards": 2}), num_averages=1)
    assert sharded.states == unet + steps / 2
    assert sharded.step == found.step, "activations are not sharded"


@pytest.mark.parametrize("tuning", [Full, partial(Adapter, rank=2)], ids=["full", "lora"])
def test_the_traced_step_needs_what_the_real_one_does(tuning, setting) -> None:
    traced = memory_needs(*setting(tuning()), PLAIN, num_averages=0)
    module, data = setting(tuning(), on_meta=False)
    for _, parameter in trainable_parameters(module.model):
        parameter.grad = torch.zeros_like(parameter)
    (batch,) = [batch for batch, _ in zip(data.val_dataloader(), range(1), strict=False)]
    # Whatever attention a Trainer before this one has switched off.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), AllocationTracker(module.model) as ledger:
        report = module.objective(module.model, batch, Draws(0, batch.keys, batch.visits))
        loss = report.per_sample_B.mean()
        del report
        loss.backward()
    assert traced.step == pytest.approx(ledger.peak, rel=0.05)
    assert traced.flops == pytest.approx(ledger.flops, rel=0.02)


@pytest.mark.slow
def test_checkpointing_trades_flops_for_memory(setting) -> None:
    plain, recomputed = (memory_needs(*setting(Full(), checkpointing=c), PLAIN, 0) for c in (False, True))
    assert recomputed.step < plain.step
    assert recomputed.flops > plain.flops


def test_a_run_that_does_not_fit_is_an_error_with_remedies(setting) -> None:
    module, data = setting(Full())
    with pytest.raises(UserError, match=r"needs 1\.\d GiB on each GPU and there are 1\.0; set ") as raised:
        Preflight(memory=1.0, tflops=1.0)(module, data, replace(PLAIN, on_gpu=True, num_devices=2), 1)
    remedies = ["model.gradient_checkpointing=true", "text_encoder: bf16, text_encoder_2: bf16", "data.batch_size=1"]
    assert all(remedy in str(raised.value) for remedy in [*remedies, "tuning=lora_unet", "strategy=fsdp"])


def test_one_card_is_not_told_to_shard(setting) -> None:
    module, data = setting(Adapter(rank=2))
    with pytest.raises(UserError) as raised:
        Preflight(memory=1.0, tflops=1.0)(module, data, replace(PLAIN, on_gpu=True), 1)
    assert "fsdp" not in str(raised.value)


def test_drawing_and_caching_are_stages_of_their_own(tiny_model, tiny_source) -> None:
    """Images of 64 px are drawn in a run that trains on 32: the most of the stages counts."""
    needs = {}
    for cache, drawn in (("off", 0), ("ram", 0), ("off", 4)):
        data = Images(tiny_source(6), tiny_source(2, "held out"), 1, size=32, cache=cache)
        with MetaBuild():
            module = Finetuning(
                tiny_model().to("meta"), Adapter(rank=2), Denoising(), partial(adamw, lr=1e-3), constant, seed=0
            )
        needs[cache, drawn] = memory_needs(module, data, replace(PLAIN, num_drawn=drawn, drawn_side=64), 0)
    plain, cached, drawing = needs.values()
    assert (plain.caching, plain.drawing) == (0, 0)
    assert cached.caching > sum(p.nbytes for p in tiny_model().parameters())
    assert drawing.drawing > drawing.held
    assert drawing.total == max(drawing.drawing, drawing.training)
    assert plain.host >= plain.total


def test_a_step_larger_than_the_data_is_refused(setting) -> None:
    _, data = setting(Full())
    refuse_batch(data, PLAIN)
    four = Setup(10, 2, "32-true", 2, 1, False)
    with pytest.raises(UserError, match=r"data.batch_size=2: a step takes 8 images .* set data.batch_size=1"):
        refuse_batch(data, four)


def dry(monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["train.py", "dry_run=true", *words])
    train.main()
    return capsys.readouterr().out


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    printed = dry(monkeypatch, capsys, "experiment=dreamy_style", "trainer.devices=2", "trainer.accelerator=cpu")
    assert "trains unet: 292,864 of 10,490,139 parameters (2.79%)" in printed
    assert "effective batch 32 (16 x 1 accumulated x 2 devices), 240 steps = 160.0 passes over 48 images" in printed
    assert "memory of each device" in printed
    assert "time of the run" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_sdxl_is_planned_without_its_weights(tmp_path: Path, monkeypatch, capsys) -> None:
    """The real UNet has 2,567,463,684 parameters; a forward pass at 1024 px is about 6 TFLOP."""
    monkeypatch.chdir(tmp_path)
    words = ["model=sdxl", "data=toy", "size=1024", "preflight.memory=24", "preflight.tflops=800"]
    printed = dry(monkeypatch, capsys, *words)
    (unet,) = [line for line in printed.splitlines() if line.startswith("  unet ")]
    adapters = int(unet.split(",", 3)[-1].split("trainable")[0].strip().replace(",", "").split()[-1])
    assert int(unet.split()[1].replace(",", "")) - adapters == 2_567_463_684
    assert list(tmp_path.iterdir()) == []
    (time,) = [line for line in printed.splitlines() if "time of a step" in line]
    assert 4 * 18 < float(time.split(" TFLOP at")[0].split("= ")[1]) < 4 * 26, "4 accumulated, recomputed"


def test_the_jobs_of_a_sweep_are_listed(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    printed = dry(monkeypatch, capsys, "-m", "rank=4,8", "seed=0,1")
    assert "job 2: dry_run=True rank=8 seed=0" in printed
    assert "sbatch --array=0-3" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("experiment", ["nano_vae", "nano_clip"])
def test_a_network_that_draws_no_images_is_forecast_too(experiment: str, monkeypatch, capsys) -> None:
    printed = dry(monkeypatch, capsys, f"experiment={experiment}", "preflight.tflops=1")
    assert "memory of each device" in printed
    assert "while training" in printed


@pytest.mark.parametrize(("tuning", "fused"), [(partial(Adapter, rank=2), False), (Full, False), (Full, True)])
def test_blocks_on_the_host_take_two_slots_on_the_device(tuning, fused: bool, tiny_source) -> None:
    """Their weights, and gradients, states and averages where they learn, are counted for the machine."""

    def needs(count) -> tuple[MemoryNeeds, Finetuning]:
        data = Images(tiny_source(6), tiny_source(2, "held out"), 2, size=32, cache="off")
        with MetaBuild():
            model = pretrained_on_meta("nano", gradient_checkpointing=True, offload_blocks=count)
            build = partial(adamw, lr=1e-3)
            module = Finetuning(model, tuning(), Denoising(), build, constant, seed=0, fused_backward=fused)
        found = memory_needs(module, data, replace(PLAIN, on_gpu=True), num_averages=1)
        return found, module

    usual, _ = needs(0)
    found, module = needs("all")
    hosted, (stream,) = on_host(module.model), streams(module.model)
    there = sum(p.nbytes for p in hosted)
    learning = tuning is Full
    blocks = [[p for p in stream.weights(i) if not p.requires_grad] for i in range(len(stream.places))]
    kinds = {tuple(p.shape for p in block): sum(p.nbytes for p in block) for block in blocks}
    assert found.weights == usual.weights - there + 2 * sum(kinds.values())
    largest = max(sum(p.nbytes for p in stream.weights(i)) for i in range(len(stream.places)))
    # Where blocks learn, the copy of one and its gradients.
    assert found.step == pytest.approx(usual.step + learning * largest, rel=0.05, abs=learning * largest)
    assert found.flops == usual.flops
    if learning:
        assert found.gradients == usual.gradients - (0 if fused else there)
        assert found.states == pytest.approx(usual.states - 2 * there, rel=1e-3)
        assert found.average == usual.average - there
        extra = 2 * there + there + (0 if fused else there)  # states, average, gradients
        assert found.host == pytest.approx(usual.host + extra, rel=0.15)
    else:
        assert (found.gradients, found.states, found.average) == (usual.gradients, usual.states, usual.average)
        assert found.host == pytest.approx(usual.host)
