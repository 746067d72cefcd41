"""Several processes against one: the same losses, the same weights, and checkpoints that go anywhere (laws 1 and 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from small_runs import TUNINGS, WRONG, KillAt, Run, finish, result, start

from sdft.formats.run_state import read_state
from sdft.strategies import Copies, auto
from sdft.tuning import learning

KILLED = -9


def mean_losses(losses: list[float], accumulate: int = 1) -> torch.Tensor:
    return torch.tensor(losses).view(-1, accumulate).mean(1)


def close(one: dict[str, Any], many: dict[str, Any], accumulate: int = 1) -> None:
    """Up to the rounding of sums in another order, which fifty steps of AdamW amplify."""
    torch.testing.assert_close(mean_losses(one["losses"]), mean_losses(many["losses"], accumulate), rtol=2e-3, atol=0)
    assert one["step"] == many["step"]


@pytest.mark.parametrize("tuning", ["full", "lora_unet_te"])
def test_the_same_fifty_losses_on_one_process_on_two_and_by_accumulation(tuning: str, tmp_path: Path) -> None:
    """A batch of 4 as 1 x 4, 2 x 2 and 2 accumulated x 2: copies, shards, and one process in two turns."""

    def run(name: str, world_size: int = 1, **options: Any) -> dict[str, Any]:
        settings = {"tuning": tuning, "max_steps": 50, "save_every": 50, "validate_every": 50, "lr": 2e-3, **options}
        return result(Run(tmp_path / name, **settings), world_size)

    one = run("one", batch_size=4)
    assert one["losses"][-1] != one["losses"][0]
    close(one, run("accumulated", batch_size=2, accumulate=2), accumulate=2)
    close(one, run("ddp", 2, strategy="ddp"))
    close(one, run("fsdp", 2, strategy="fsdp"))


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "ddp", "accumulate": 2, "bucket_step": 16},
        {"strategy": "fsdp", "accumulate": 2, "bucket_step": 16},
        {"strategy": "fsdp", "recompute": True},
        {"strategy": "ddp", "cache": "disk"},
        {"strategy": "fsdp", "cache": "disk"},
        {"strategy": "fsdp", "cache": "off"},
        {"strategy": "hybrid"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_all_that_a_run_can_have_works_on_several_processes(options: dict[str, Any], tmp_path: Path) -> None:
    """The same six steps as one process, in losses, in validation figures and in the weights of the average."""
    world_size = 4 if options["strategy"] == "hybrid" else 2
    shared = {"tuning": "full", "clip": 0.1, **options}
    alone = {**shared, "strategy": "one", "accumulate": 1, "recompute": False}
    if options.get("cache") == "disk":
        alone["cache_dir"], shared["cache_dir"] = str(tmp_path / "cache"), str(tmp_path / "cache of two")
    one = result(Run(tmp_path / "one", batch_size=4 * options.get("accumulate", 1), **alone))
    many = result(Run(tmp_path / "many", batch_size=4 // world_size, **shared), world_size)
    close(one, many, options.get("accumulate", 1))
    assert many["validation"] == pytest.approx(one["validation"], rel=1e-4)
    apart = max(float((weight - many["weights"][name]).abs().max()) for name, weight in one["weights"].items())
    assert apart < 1e-4, "clipping at 0.1 makes each step 1e-2 of the rate; nothing else moves weights"


def test_bf16_is_gathered_in_bf16_and_learns_in_fp32(tmp_path: Path) -> None:
    one = result(Run(tmp_path / "one", "full", batch_size=4, precision="bf16-mixed"))
    many = result(Run(tmp_path / "many", "full", "fsdp", precision="bf16-mixed"), 2)
    torch.testing.assert_close(mean_losses(one["losses"]), mean_losses(many["losses"]), rtol=3e-2, atol=0)
    assert {weight.dtype for weight in many["weights"].values()} == {torch.float32}


@pytest.mark.parametrize("tuning", ["full", "lora_unet_te"])
def test_a_checkpoint_goes_on_under_any_strategy_and_number_of_processes(tuning: str, tmp_path: Path) -> None:
    """Two shards, killed; one process that accumulates, killed; two copies: as one process without a stop."""
    settings = {"tuning": tuning, "max_steps": 9}
    straight = result(Run(tmp_path / "straight", batch_size=4, **settings))
    folder = tmp_path / "chain"
    shards = Run(folder, strategy="fsdp", callbacks=[KillAt(3)], **settings)
    assert finish(start(shards, 2)) == [KILLED, KILLED]
    one = Run(folder, batch_size=2, accumulate=2, resume=shards.last, callbacks=[KillAt(6)], **settings)
    assert finish(start(one)) == [KILLED]
    assert read_state(one.last)["global_step"] == 6
    copies = result(Run(folder, strategy="ddp", resume=one.last, **settings), 2)
    assert len(copies["losses"]) == 3
    torch.testing.assert_close(mean_losses(straight["losses"][6:]), mean_losses(copies["losses"]), rtol=1e-4, atol=0)
    apart = max(float((weight - copies["weights"][name]).abs().max()) for name, weight in straight["weights"].items())
    assert apart < 1e-4


@pytest.mark.parametrize("tuning", ["full", "lora_unet_te"])
def test_a_checkpoint_of_shards_is_that_of_one_process(tuning: str, tmp_path: Path) -> None:
    """The same names, shapes and types throughout, and the same export, bit for bit, once one process opens it.

    The run is at its end, so nothing is trained: this is also what a run does that was killed while it exported.
    """
    shards = Run(tmp_path / "shards", tuning, "fsdp", export=True)
    result(shards, 2)
    one = Run(tmp_path / "one", tuning, batch_size=4)
    result(one)
    assert_alike(read_state(shards.last), read_state(one.last))
    opened = Run(tmp_path / "opened", tuning, batch_size=4, resume=shards.last, export=True)
    assert result(opened)["losses"] == []
    files = sorted(file.relative_to(shards.folder) for file in shards.folder.rglob("*.safetensors"))
    assert files
    for file in files:
        theirs, ours = load_file(shards.folder / file), load_file(opened.folder / file)
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs), file


def assert_alike(a: Any, b: Any, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_alike(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_alike(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), where


class Sent(L.Callback):
    """What DDP averages and what it leaves alone."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        averaged = {id(p) for p in trainer.strategy.model._module_parameters}
        assert averaged == {id(p) for _, p in learning(module.model)}
        assert not trainer.strategy.model.modules_buffers
        assert not trainer.strategy.model.find_unused_parameters


@pytest.mark.parametrize("tuning", TUNINGS)
def test_copies_send_only_what_learns(tuning: str, tmp_path: Path) -> None:
    result(Run(tmp_path / "run", tuning, "ddp", max_steps=1, callbacks=[Sent()]), 2)


class Held(L.Callback):
    """How much of the model one rank holds, frozen weights included."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        unet = module.model.unet
        held = sum(p.to_local().numel() for p in unet.parameters())
        whole = sum(p.numel() for p in unet.parameters())
        assert held < 0.6 * whole
        assert sum(p.to_local().numel() for p in trainer.callbacks[0].average.values()) < 0.6 * sum(
            p.numel() for _, p in learning(module.model)
        )


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_shard_is_about_half_of_two(tuning: str, tmp_path: Path) -> None:
    result(Run(tmp_path / "run", tuning, "fsdp", max_steps=1, callbacks=[Held()]), 2)


def test_shards_that_do_not_fit_the_devices_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", "full", "hybrid")  # groups of two
    assert finish(start(run, 3)) == [WRONG] * 3
    assert "shard_ranks=2: 3 devices" in (run.folder / "error_0.txt").read_text()


def test_several_devices_are_copies_where_nothing_is_said() -> None:
    assert auto("cpu", 1, 1) == auto("cpu", "auto", 1) == "auto"
    assert isinstance(auto("cpu", 2, 1), Copies)
    assert isinstance(auto("cpu", 1, 2), Copies)
