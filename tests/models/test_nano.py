"""Packing the parts of nano: what is written, and what its card says of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hydra.utils import instantiate

from sdft.config.command import compose
from sdft.data.toy.rich_lexicon import RICH_VOCABULARY
from sdft.errors import UserError
from sdft.models.nano import WEIGHTS, build
from sdft.models.nano import __main__ as nano
from sdft.tuning.full import Full


@pytest.mark.slow
@pytest.mark.parametrize(("scenes", "command"), [("simple", "nano"), ("rich", "nano-128")])
def test_the_parts_are_packed_and_measured_as_they_are_shipped(
    scenes: str, command: str, tmp_path: Path, monkeypatch
) -> None:
    """The shipped parts in place of trained ones; of rich scenes, with a judge that has learned nothing."""
    summary = {"name": "nano_base", "num_trained_parameters": 6_590_000, "num_steps": 3000, "train_seconds": 1920}
    for part, weights in {"base": WEIGHTS, "clip": WEIGHTS / "clip"}.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "model").symlink_to(weights)
        (tmp_path / part / "summary.json").write_text(json.dumps(summary))
    if scenes == "rich":
        (tmp_path / "clip" / "model").unlink()
        build.clip(RICH_VOCABULARY, seed=0).save_pretrained(tmp_path / "clip" / "model")
    out = tmp_path / "out"
    words = [f"base={tmp_path}/base", f"clip={tmp_path}/clip", f"vae={tmp_path}/vae", f"out={out}", "num_images=12"]
    words += ["sampler.steps=4", f"scenes={scenes}"]
    if scenes == "simple":
        looks = ("plain", "photo", "dreamy", "technomant")
    else:
        looks = ("plain", "photo", "dreamy", "technomant", "brand", "ink")
        words += ["verdict@autoencoder=autoencoder_rich", "verdict@judge=judge_rich", "size=64"]
    words += [f"{part}.references.{look}.num_scenes=8" for part in ("autoencoder", "judge") for look in looks]
    monkeypatch.setattr(sys, "argv", ["nano", *words])
    nano.main()
    card = (out / "MODEL_CARD.md").read_text()
    assert "| base | `experiment=nano_base` | 6.59 M | 3,000 | 32 |" in card
    assert "for images of 64 x 64 pixels" in card
    assert all(f"| {look} |" in card for look in looks)
    num_words = {"simple": 82, "rich": 132}[scenes]
    assert f"a vocabulary of {num_words} English words" in card
    assert f"Trained by `make {command}`" in card
    assert ("of two subjects" in card) == (scenes == "rich")
    assert {file.name for file in out.iterdir()} == {"MODEL_CARD.md", "samples.png", "vae.png", "weights"}
    assert (out / "weights" / "clip" / "tokenizer.json").is_file()


@pytest.mark.parametrize("experiment", ["nano_vae", "nano_vae_128", "nano_clip", "nano_clip_128"])
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
    judge = build.clip(RICH_VOCABULARY, seed=0)
    tuning.attach(judge)
    with pytest.raises(UserError, match="no parameter of 'logit_scael' is trainable"):
        tuning.groups(judge)
