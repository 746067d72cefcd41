"""Runs with the options of the menu: killed and resumed they end with the same bits; split, with the same weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import WRONG, KillAt, Run, assert_same_end, finish, result, start

from sdft.objective.loss import Huber, SmoothL1
from sdft.objective.noise import Offset, Pyramid
from sdft.objective.prior import PriorPrediction
from sdft.objective.timesteps import CubicTimesteps, LogitNormalTimesteps
from sdft.objective.weighting import P2, Curve, SNRInverse, SoftMinSNR
from sdft.optimizers.schedules import constant, linear

MENU: dict[str, dict[str, Any]] = {
    "lora": {
        "tuning": "lora_unet",
        "tuning_options": {
            "rslora": True, "rank_pattern": {"*.to_q": 3}, "alpha_pattern": {"*.to_k": 2.0}, "exclude": ["*.proj_in"],
            "dropout": 0.2, "rank_dropout": 0.2, "module_dropout": 0.2, "lora_plus": 4.0, "max_norm": 0.5,
        },
        "objective_options": {
            "loss": Huber(0.2, "snr"), "noise": Pyramid(), "weighting": P2(0.5), "stratified": True,
            "input_perturbation": 0.3, "perturbed_share": 0.6,
        },
    },
    "pissa": {
        "tuning": "lora_unet",
        "tuning_options": {"init": "pissa"},
        "objective_options": {"weighting": Curve([[0, 1], [1, 0.3]]), "timesteps": CubicTimesteps()},
    },
    "conv": {
        "tuning": "lora_unet",
        "tuning_options": {"layers": "conv", "conv_rank": 1, "conv_alpha": 2.0, "init": "kaiming", "rank_dropout": 0.3},
        "objective_options": {"loss": Huber(0.2, "exponential"), "noise": Offset(0.1, random=True)},
    },
    "words_and_encoders": {
        "tuning": "lora_unet_te",
        "tuning_options": {"vectors": {"<sks>": 2}, "stop_at": {"text_encoder": 0.5, "words": 0.3}},
        "objective_options": {
            "loss": SmoothL1(0.3, "constant"), "noise": Offset(0.1, True, 0.2), "weighting": SoftMinSNR(),
            "prior": PriorPrediction("a red cat", 0.7),
        },
        "part_schedules": {"text_encoder_2": partial(linear, warmup_steps=1), "words": constant},
    },
    "words": {
        "tuning": "words",
        "tuning_options": {"vectors": {"<sks>": 3}},
        "objective_options": {"prediction": "v_prediction", "weighting": SNRInverse()},
    },
    "full": {
        "tuning": "full",
        "tuning_options": {"decay_to_base": 0.1},
        "objective_options": {
            "prediction": "flow_prediction", "timesteps": LogitNormalTimesteps(), "stratified": True,
        },
    },
    "z0": {"tuning": "full", "objective_options": {"prediction": "sample"}},
}  # fmt: skip


@pytest.mark.parametrize("name", MENU)
def test_killed_and_resumed(name: str, tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", **MENU[name])
    expected = result(whole)
    assert expected["step"] == 6
    saved = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    killed = Run(tmp_path / "killed", **MENU[name], callbacks=[KillAt(4, saved=saved)])
    assert finish(start(killed)) == [-9]
    resumed = replace(killed, callbacks=[], resume=killed.last)
    assert_same_end(whole, resumed, expected, result(resumed))


@pytest.mark.parametrize("name", MENU)
def test_split_over_accumulation_and_processes(name: str, tmp_path: Path) -> None:
    """4 at once, 2 x 2 accumulated, 2 processes of 2, and 2 shards of 2: the same weights, up to float rounding."""
    options = {**MENU[name], "max_steps": 3, "caption_dropout": 0.2, "lr": 1e-3}
    together = result(Run(tmp_path / "4", batch_size=4, **options))
    splits: list[tuple[str, dict[str, Any], int]] = [
        ("2x2", {"batch_size": 2, "accumulate": 2}, 1),
        ("ranks", {"batch_size": 2, "strategy": "ddp"}, 2),
    ]
    if "max_norm" not in MENU[name].get("tuning_options", {}):
        splits.append(("shards", {"batch_size": 2, "strategy": "fsdp"}, 2))
    for folder, run, world_size in splits:
        split = result(Run(tmp_path / folder, **run, **options), world_size)
        assert split["weights"].keys() == together["weights"].keys()
        for key, weight in together["weights"].items():
            torch.testing.assert_close(split["weights"][key], weight, rtol=2e-3, atol=2e-5, msg=f"{folder} {key}")
        assert split["validation"] == pytest.approx(together["validation"], rel=1e-4)


def test_max_norm_is_refused_on_shards(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", tuning_options={"max_norm": 1.0}, strategy="fsdp")
    assert finish(start(run, 2)) == [WRONG, WRONG]
    assert "tuning.max_norm: computes with whole weights" in (run.folder / "error_0.txt").read_text()
