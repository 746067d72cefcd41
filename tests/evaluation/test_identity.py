"""Identity and forgetting: what the measure says of images whose subject is known."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from sdft.data.sources import ToyWorld
from sdft.evaluation import after_training, identity
from sdft.evaluation.identity import IdentityEvaluation, recognised
from sdft.protocols import PartialVerdict
from sdft.sampling.samplers import Sampler

WORD = "zorbix"
NUM = 64


@cache
def world(**options) -> ToyWorld:
    """As many scenes as the experiments have: with fewer of others, more of them are taken for the subject."""
    return ToyWorld(["plain"], 128 if "own" in options else 256, "test", size=64, **options)


def evaluation(**options) -> IdentityEvaluation:
    given = {"judge": "nano", "others": world(world_seed=2), "num_images": NUM} | options
    reference = world(own="sneaker", name=WORD)
    sampler = Sampler("euler", steps=1, cfg=1.0)
    return IdentityEvaluation(reference, [f"a {WORD}"], sampler, 64, WORD, "sneaker", **given)


def drawn(monkeypatch, own: str | None, spoiled: bool, tmp_path: Path) -> dict:
    """The metrics of a model that draws for the word: `own`, or what the base draws, cats and cars."""
    base_worlds, is_base = world(world_seed=7), [False]

    @contextmanager
    def base():
        is_base[0] = True
        yield
        is_base[0] = False

    def draw(model, prompts, seeds, sampler, size_hw, precision, progress=None):
        """Scenes of the world of other seeds than the reference's."""
        if any(WORD in prompt for prompt in prompts):
            of_own = ToyWorld(["plain"], NUM, "validation", own=own, size=64)
            source = base_worlds if is_base[0] or own is None else of_own
            return np.stack([source[i % len(source.keys)].image_HWC for i in range(len(prompts))])
        others = world(world_seed=2)
        shown = [others[i].image_HWC for i in range(len(prompts))]
        return np.stack(shown[::-1] if spoiled and not is_base[0] else shown)

    monkeypatch.setattr(after_training, "generate", draw)
    return evaluation()(None, base, tmp_path)


def test_a_model_that_draws_the_subject_is_recognised(monkeypatch, tmp_path: Path) -> None:
    found = drawn(monkeypatch, "sneaker", False, tmp_path)
    assert found["recognised"] >= 0.8
    assert found["recognised_base"] <= 0.1
    assert found["recognised_others"] <= 0.1
    assert found["recognised_reference"] >= 0.9
    assert found["identity"] == pytest.approx(1, abs=0.15)
    assert found["forgetting"] == 0
    assert (tmp_path / "before_after.png").is_file()


def test_one_that_draws_what_the_base_does_is_not(monkeypatch, tmp_path: Path) -> None:
    found = drawn(monkeypatch, None, False, tmp_path)
    assert found["identity"] == pytest.approx(0, abs=1e-5)
    assert found["recognised"] == found["recognised_base"] <= 0.1


def test_another_subject_is_not_taken_for_it(monkeypatch, tmp_path: Path) -> None:
    found = drawn(monkeypatch, "wizard", False, tmp_path)
    assert found["identity"] < 0.6


def test_other_subjects_that_are_lost_are_forgetting(monkeypatch, tmp_path: Path) -> None:
    found = drawn(monkeypatch, "sneaker", True, tmp_path)
    assert found["adherence_others_base"] >= 0.8
    assert found["forgetting"] >= 0.5


def test_without_a_judge_nothing_is_measured_and_the_picture_is_drawn(monkeypatch, tmp_path: Path) -> None:
    black = np.zeros((1, 64, 64, 3), np.uint8)
    monkeypatch.setattr(after_training, "generate", lambda model, prompts, *_: black.repeat(len(prompts), 0))
    verdict = evaluation(judge=None)
    assert isinstance(verdict, PartialVerdict)
    found = verdict(None, nullcontext, tmp_path)
    assert [found[name] for name in identity.METRICS] == [None] * 4
    assert found["identity_note"] == "not measured: verdict.judge is null; name a CLIP with verdict.judge="
    assert (tmp_path / "before_after.png").is_file()


def test_prompts_of_your_own_are_measured_in_turn(tiny_source) -> None:
    sampler = Sampler("euler", steps=1, cfg=1.0)
    options = {"other_prompts": ["a dog", "a cat", "a bird"], "num_images": 4}
    verdict = IdentityEvaluation(tiny_source(4), ["x here", "x there"], sampler, 32, "x", "mug", **options)
    assert verdict.measured == ["x here", "x there", "x here", "x there"]
    assert verdict.other_prompts == ["a dog", "a cat", "a bird", "a dog"]


def test_an_image_is_not_its_own_neighbour() -> None:
    own, others = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.8, 0.6]])
    assert recognised(own, own, others) == 0
    assert recognised(torch.tensor([[0.96, 0.28]]), own, others) == 1
    assert recognised(torch.tensor([[0.6, 0.8]]), own, others) == 0


def test_without_other_prompts_only_forgetting_is_missing(monkeypatch, tmp_path: Path) -> None:
    reference = world(own="sneaker", name=WORD)
    images = np.stack([reference[i].image_HWC for i in range(4)])
    monkeypatch.setattr(after_training, "generate", lambda model, prompts, *_: images[: len(prompts)])
    sampler = Sampler("euler", steps=1, cfg=1.0)
    verdict = IdentityEvaluation(reference, [f"a {WORD}"], sampler, 64, WORD, "cup", judge="nano", num_images=4)
    found = verdict(None, nullcontext, tmp_path)
    assert found["forgetting"] is None
    assert found["forgetting_note"] == "not measured: verdict.other_prompts is empty"
    assert isinstance(found["recognised"], float)
