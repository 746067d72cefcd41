"""Packing the parts of nano: what is written, and what its card says of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hydra.utils import instantiate

from sdft.config.command import compose
from sdft.data.toy.lexicon import VOCABULARY
from sdft.errors import UserError
from sdft.models.nano import WEIGHTS, build
from sdft.models.nano import __main__ as nano
from sdft.tuning.full import Full

LOOKS = ("plain", "photo", "dreamy", "technomant", "brand", "ink")


@pytest.mark.slow
def test_the_parts_are_packed_and_measured_as_they_are_shipped(tmp_path: Path, monkeypatch) -> None:
    """The shipped parts in place of trained ones."""
    summary = {"name": "nano_base", "num_trained_parameters": 6_590_000, "num_steps": 3000, "train_seconds": 1920}
    parts = {"base": WEIGHTS, "clip": WEIGHTS / "clip", "clip_watching": WEIGHTS / "clip_watching"}
    for part, weights in parts.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "model").symlink_to(weights)
        (tmp_path / part / "summary.json").write_text(json.dumps(summary))
    out = tmp_path / "out"
    words = [*(f"{part}={tmp_path}/{part}" for part in (*parts, "vae")), f"out={out}", "num_images=12"]
    words += ["sampler.steps=4", "size=64"]
    words += [f"{part}.references.{look}.num_scenes=8" for part in ("autoencoder", "judge") for look in LOOKS]
    monkeypatch.setattr(sys, "argv", ["nano", *words])
    nano.main()
    card = (out / "MODEL_CARD.md").read_text()
    assert "| base | `experiment=nano_base` | 6.59 M | 3,000 | 32 |" in card
    assert "for images of 64 x 64 pixels" in card
    assert all(f"| {look} |" in card for look in LOOKS)
    assert "a vocabulary of 132 English words" in card
    assert {file.name for file in out.iterdir()} == {"MODEL_CARD.md", "samples.png", "vae.png", "weights"}
    assert all((out / "weights" / judge / "tokenizer.json").is_file() for judge in ("clip", "clip_watching"))


@pytest.mark.parametrize("experiment", ["nano_vae", "nano_clip", "nano_clip_watching"])
def test_every_weight_of_the_vae_and_the_judge_trains(experiment: str) -> None:
    """Also those that are in no submodule: the judge's temperature stayed at its first value once."""
    cfg = compose("train", [f"experiment={experiment}"])
    model = instantiate(cfg.model)
    tuning = instantiate(cfg.tuning)
    tuning.attach(model)
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == []
    trained = [id(weight) for group in tuning.groups(model) for weight in group["params"]]
    assert sorted(trained) == sorted(map(id, model.parameters()))


def test_a_part_that_the_model_lacks_is_refused() -> None:
    tuning = Full(["logit_scael"])
    judge = build.clip(VOCABULARY, seed=0)
    tuning.attach(judge)
    with pytest.raises(UserError, match="no parameter of 'logit_scael' is trainable"):
        tuning.groups(judge)
