"""Several processes against one: the same losses and weights, and checkpoints that fit any number of processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from checks import slow
from safetensors.torch import load_file
from small_runs import WRONG, KillAt, Run, finish, result, start
from torch.profiler import ProfilerActivity

from sdft.distributed.sharding import local_shard
from sdft.distributed.strategies import TrainableDDP, auto
from sdft.formats.training_checkpoint import read_state, slices_folder
from sdft.training.callbacks.ema import EMA
from sdft.tuning.full import Full
from sdft.tuning.parameters import trainable_parameters

KILLED = -9


def mean_losses(losses: list[float], accumulate: int = 1) -> torch.Tensor:
    return torch.tensor(losses).view(-1, accumulate).mean(1)


def close(one: dict[str, Any], many: dict[str, Any], accumulate: int = 1) -> None:
    """Up to the rounding of sums in another order, which fifty steps of AdamW amplify."""
    torch.testing.assert_close(mean_losses(one["losses"]), mean_losses(many["losses"], accumulate), rtol=2e-3, atol=0)
    assert one["step"] == many["step"]


class Sent(L.Callback):
    """DDP averages the gradients of the trainable parameters only."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        copies = trainer.strategy.model
        assert {id(p) for p in copies._module_parameters} == {id(p) for _, p in trainable_parameters(module.model)}
        assert not copies.modules_buffers
        assert not copies.find_unused_parameters


class Held(L.Callback):
    """A rank holds about half of two, frozen weights and average included."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        (average,) = (callback.average for callback in trainer.callbacks if isinstance(callback, EMA))
        for weights in (list(module.model.unet.parameters()), list(average.values())):
            assert sum(local_shard(weight).numel() for weight in weights) < 0.6 * sum(w.numel() for w in weights)


class Bytes(L.Callback):
    """The messages of a step have the sizes given in docs/scaling.md."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2 and not hasattr(self, "record"):
            self.record = torch.profiler.profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self.record.start()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step == 3 and not hasattr(self, "seen"):
            self.record.stop()
            gathered = self.numbers("c10d::_allgather_base_", 0)
            scattered = self.numbers("c10d::_reduce_scatter_base_", 1)
            reduced = self.numbers("gloo:all_reduce", 0) - scattered  # gloo makes the other out of it
            self.seen = reduced, scattered, gathered
            *exactly, gathered = self.expected(trainer, module)
            # In LoRA the very first blocks are gathered once: they have nothing to pass a gradient on to.
            expected = (*exactly, gathered if isinstance(module.tuning, Full) else pytest.approx(gathered, rel=0.02))
            assert self.seen == expected, f"{self.seen}, not {expected}"

    def numbers(self, operation: str, whole: int) -> int:
        """In the tensor at this place of the operation's, which is whole; not of logged metrics, nor of norms."""
        shapes = [event.input_shapes[whole] for event in self.record.events() if event.name == operation]
        return sum(num for num in map(math.prod, shapes) if num > 100)

    def expected(self, trainer: L.Trainer, module: Any) -> tuple[int, int, int]:
        learn = sum(p.numel() for _, p in trainable_parameters(module.model))
        if isinstance(trainer.strategy, TrainableDDP):
            return learn, 0, 0
        whole = sum(p.numel() for p in module.model.unet.parameters())
        batches, size = trainer.accumulate_grad_batches, trainer.strategy.mesh.size(-1)
        between = batches * learn // size if size < trainer.world_size else 0  # all copies have theirs
        return between, batches * learn, batches * 2 * whole


@pytest.mark.slow
def test_the_same_fifty_losses_on_one_process_on_two_and_by_accumulation(tmp_path: Path) -> None:
    """A batch of 4 as 1 x 4, 2 x 2 and 2 accumulated x 2: copies, shards, and one process in two turns."""

    def run(name: str, world_size: int = 1, **options: Any) -> dict[str, Any]:
        settings = {"max_steps": 50, "save_every": 50, "validate_every": 50, "lr": 2e-3, **options}
        return result(Run(tmp_path / name, "lora_unet_te", **settings), world_size)

    one = run("one", batch_size=4)
    close(one, run("accumulated", batch_size=2, accumulate=2), accumulate=2)
    close(one, run("ddp", 2, strategy="ddp", callbacks=[Sent()]))
    close(one, run("fsdp", 2, strategy="fsdp", callbacks=[Held()]))


@pytest.mark.parametrize(
    ("tuning", "options"),
    [
        slow("full", {"strategy": "ddp", "accumulate": 2, "bucket_step": 16, "callbacks": [Sent(), Bytes()]}),
        ("lora_unet", {"strategy": "ddp", "cache": "disk", "callbacks": [Sent(), Bytes()]}),
        slow(
            "full",
            {"strategy": "fsdp", "accumulate": 2, "bucket_step": 16, "recompute": True, "cache": "disk"}
            | {"callbacks": [Held(), Bytes()]},
        ),
        slow("lora_unet", {"strategy": "hybrid", "cache": "disk", "callbacks": [Bytes()]}),
    ],
    ids=["ddp full", "ddp lora", "fsdp full", "hybrid lora"],
)
def test_all_that_a_run_can_have_works_on_several_processes(tuning: str, options: dict[str, Any], tmp_path) -> None:
    """The same six steps as one process, in losses, in validation metrics and in the weights of the average."""
    world_size = 4 if options["strategy"] == "hybrid" else 2
    accumulate = options.get("accumulate", 1)
    shared = {"clip": 0.1, **options}
    alone = {**shared, "strategy": "one", "accumulate": 1, "recompute": False, "callbacks": []}
    if options.get("cache") == "disk":
        alone["cache_dir"], shared["cache_dir"] = str(tmp_path / "cache"), str(tmp_path / "cache of two")
    one = result(Run(tmp_path / "one", tuning, batch_size=4 * accumulate, **alone))
    many = result(Run(tmp_path / "many", tuning, batch_size=4 // world_size, **shared), world_size)
    close(one, many, accumulate)
    assert many["validation"] == pytest.approx(one["validation"], rel=1e-4)
    assert_near(one["weights"], many["weights"])
    if options["strategy"] == "hybrid":
        slices = slices_folder(tmp_path / "many" / "checkpoints" / "last.ckpt")
        assert len(list(slices.iterdir())) == 2, "of two copies one is saved"


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Two thousandths of what six steps at a rate of 1e-2 move at most."""
    apart = max(float((weight - theirs[name]).abs().max()) for name, weight in ours.items())
    assert apart < 1e-4


@pytest.mark.slow
def test_bf16_is_gathered_in_bf16_and_learns_in_fp32(tmp_path: Path) -> None:
    settings = {"tuning": "lora_unet", "precision": "bf16-mixed", "max_steps": 3}
    one = result(Run(tmp_path / "one", batch_size=4, **settings))
    many = result(Run(tmp_path / "many", strategy="fsdp", **settings), 2)
    torch.testing.assert_close(mean_losses(one["losses"]), mean_losses(many["losses"]), rtol=3e-2, atol=0)
    assert {weight.dtype for weight in many["weights"].values()} == {torch.float32}


@pytest.mark.slow
def test_a_checkpoint_goes_on_under_any_strategy_and_number_of_processes(tmp_path: Path) -> None:
    """Two shards, killed; one process that accumulates, killed; two copies: as one process without a stop."""
    settings = {"tuning": "lora_unet_te", "max_steps": 9}
    straight = result(Run(tmp_path / "straight", batch_size=4, **settings))
    folder = tmp_path / "chain"
    shards = Run(folder, strategy="fsdp", **settings)
    shards.callbacks = [KillAt(3, saved=shards.last)]
    assert finish(start(shards, 2)) == [KILLED, KILLED]
    one = Run(folder, batch_size=2, accumulate=2, resume=shards.last, callbacks=[KillAt(6)], **settings)
    assert finish(start(one)) == [KILLED]
    assert read_state(one.last)["global_step"] == 6
    copies = result(Run(folder, strategy="ddp", resume=one.last, **settings), 2)
    assert len(copies["losses"]) == 3
    torch.testing.assert_close(mean_losses(straight["losses"][6:]), mean_losses(copies["losses"]), rtol=1e-4, atol=0)
    assert_near(straight["weights"], copies["weights"])


def test_a_checkpoint_of_shards_is_that_of_one_process(tmp_path: Path) -> None:
    """The same names, shapes and types throughout, and the same export, bit for bit, once one process opens it.

    The run is at its end, so nothing is trained: this is also what a run does that was killed while it exported.
    """
    shards = Run(tmp_path / "shards", "full", "fsdp", export=True)
    result(shards, 2)
    one = Run(tmp_path / "one", "full", batch_size=4)
    result(one)
    theirs, ours = read_state(shards.last), read_state(one.last)
    assert theirs.keys() == ours.keys()
    for name in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert_alike(theirs[name], ours[name], name)
    assert_alike(theirs["callbacks"]["EMA"], ours["callbacks"]["EMA"], "EMA")
    opened = Run(tmp_path / "opened", "full", batch_size=4, resume=shards.last, export=True)
    assert result(opened)["losses"] == []
    files = sorted(file.relative_to(shards.folder) for file in shards.folder.rglob("*.safetensors"))
    assert files
    for file in files:
        theirs, ours = load_file(shards.folder / file), load_file(opened.folder / file)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs), file


def assert_alike(a: Any, b: Any, where: str = "") -> None:
    assert isinstance(a, type(b)), where  # of slices, a dict that puts them together
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_alike(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_alike(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), where


def test_shards_that_do_not_fit_the_devices_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "full", "hybrid")  # groups of two
    assert finish(start(run, 3)) == [WRONG] * 3
    assert "shard_ranks=2: 3 devices" in (run.folder / "error_0.txt").read_text()


def test_shards_on_one_device_end_like_a_run_without(tmp_path: Path) -> None:
    """It saves, exports and ends; with one device there is nothing to shard."""
    options = {"tuning": "full", "export": True, "max_steps": 3}
    expected = result(Run(tmp_path / "one", **options))
    sharded = result(Run(tmp_path / "fsdp", strategy="fsdp", **options))
    assert sharded["weights"].keys() == expected["weights"].keys()
    for name, weight in sharded["weights"].items():
        torch.testing.assert_close(weight, expected["weights"][name], rtol=1e-3, atol=1e-5)
    assert (tmp_path / "fsdp/checkpoints/last.ckpt").exists()


def test_several_devices_are_copies_where_nothing_is_said() -> None:
    assert auto("cpu", 1, 1) == auto("cpu", "auto", 1) == "auto"
    assert isinstance(auto("cpu", 2, 1), TrainableDDP)
    assert isinstance(auto("cpu", 1, 2), TrainableDDP)
