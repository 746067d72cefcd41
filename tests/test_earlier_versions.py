"""Configs, run folders and checkpoints of version 0.1.0 still open. The run is `experiment=technomant` at rank 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sdft
from sdft.config.check import locate
from sdft.config.keys import ConfigError
from sdft.config.moved import current_name
from sdft.config.trust import read_config
from sdft.evaluation.run import rebuild
from sdft.formats.training_checkpoint import read_state
from sdft.training import receipt
from sdft.tuning.parameters import copy_parameters, trainable_parameters

FIXTURES = Path(__file__).parent / "fixtures"
RUN = FIXTURES / "run_of_version_0_1"
TARGETS = (FIXTURES / "targets_of_version_0_1.txt").read_text().split()
"""Every `_target_` in the configs of that version that a run could hold."""


@pytest.mark.parametrize("target", TARGETS)
def test_every_class_that_a_config_could_name_is_found(target: str) -> None:
    found = locate(current_name(target), "_target_")
    assert callable(found)


def test_a_name_that_never_moved_stays() -> None:
    assert current_name("torch.optim.SGD") == "torch.optim.SGD"
    assert current_name("sdft.optimizers.optimizers.adamw") == "sdft.optimizers.optimizers.adamw"


def test_the_names_in_a_config_are_todays_at_every_depth() -> None:
    cfg = read_config(RUN / ".hydra" / "config.yaml")
    assert cfg.objective._target_ == "sdft.objective.denoising.Denoising"
    assert cfg.objective.weighting._target_ == "sdft.objective.weighting.MinSNR"
    assert cfg.callbacks.guard._target_ == "sdft.training.callbacks.guard.Guard"
    assert cfg.trainer.strategy._target_ == "sdft.distributed.strategies.auto"


@pytest.mark.parametrize("content", ["- a list\n", "a: [1\n", None])
def test_what_is_no_config_is_named(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        read_config(file)


def test_the_model_of_a_run_is_rebuilt_with_its_checkpoint() -> None:
    """The checkpoint's average is what was exported: LoRA B of a layer, in fp16."""
    model, _ = rebuild(RUN)
    state = read_state(RUN / "checkpoints" / "last.ckpt")
    average = state["callbacks"]["EMA"]["average"]
    assert {name for name, _ in trainable_parameters(model)} == set(average)
    copy_parameters(model, average)
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    trained = model.get_submodule(layer).lora_B["default"].weight
    exported = load_file(RUN / "lora.safetensors")[f"{layer}.lora_B.weight"]
    assert torch.equal(trained.half(), exported)
    assert trained.abs().max() > 0


@pytest.mark.slow
def test_a_run_is_resumed(tmp_path: Path) -> None:
    before = read_state(RUN / "checkpoints" / "last.ckpt")
    run = sdft.finetune(
        ["experiment=technomant", "rank=1", "tuning.layers=attention", "trainer.max_steps=4", "~callbacks.previews",
         "~callbacks.best", "verdict=none", f"resume={RUN}", f"run_dir={tmp_path}", "trainer.precision=32-true"]
    )  # fmt: skip
    after = read_state(tmp_path / "checkpoints" / "last.ckpt")
    assert (before["global_step"], after["global_step"]) == (3, 4)
    assert after["callbacks"]["EMA"]["num_updates"] == 4
    assert run.artifacts["lora"].is_file()


def test_its_lora_is_baked_into_a_model(tmp_path: Path) -> None:
    lora, out = RUN / "lora.safetensors", tmp_path / "baked"
    merged = sdft.merge("bake", base="nano", lora=str(lora), out=str(out), dry_run=True)
    assert merged.lines


def test_its_receipt_gives_the_overrides() -> None:
    overrides = receipt.recalled([f"reproduce={RUN / 'receipt.json'}", "dry_run=true"])
    assert overrides[:2] == ["experiment=technomant", "rank=1"]
    assert overrides[-1] == "dry_run=true"
