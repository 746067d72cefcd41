"""Figures of a few pictures, on pictures whose values are known."""

from __future__ import annotations

import re

import numpy as np
import pytest

from sdft.config.command import build, compose
from sdft.data.sources.toy import ToyWorld
from sdft.evaluation.watching import FIGURES, StyleOfFew, Watched
from sdft.sampling.samplers import Sampler

NUM = 12


def rendered(look: str, split: str, num: int) -> np.ndarray:
    world = ToyWorld([look], num, split)
    return np.stack([world[index].image_HWC for index in range(num)])


@pytest.fixture(scope="module")
def watched() -> Watched:
    """Of the dreamy style, with the plain renderings of the prompts as the base's pictures."""
    reference = ToyWorld(["dreamy"], 64, "test")
    measures = Watched(
        reference, ["unused"], Sampler(), 128, other_prompts=["a photo of a dog", "a cup"], judge="nano",
        num_images=NUM, num_others=2, num_training=4,
    )  # fmt: skip
    measures.see_training(ToyWorld(["dreamy"], 16, "train"))
    measures.see_base(base_pictures())
    return measures


def base_pictures() -> dict[str, np.ndarray]:
    own = rendered("plain", "test", NUM)
    return {"own": own, "others": own[:2], "training": rendered("plain", "train", 4)}


def test_the_prompts_are_captions_with_a_seed_each(watched: Watched) -> None:
    reference = ToyWorld(["dreamy"], NUM, "test")
    assert [wanted.text for wanted in watched.wanted["own"]] == [reference[i].caption for i in range(NUM)]
    assert [wanted.seed for wanted in watched.wanted["own"]] == list(range(NUM))
    assert watched.num_pictures == NUM + 2 + 4


def test_the_base_is_the_zero_of_every_figure(watched: Watched) -> None:
    found = watched(base_pictures())
    assert set(found) <= set(FIGURES)
    assert found["style_gain"] == pytest.approx(np.zeros(NUM), abs=1e-6)
    assert found["adherence"] == pytest.approx(np.ones(NUM), abs=1e-5)
    assert found["forgetting"] == pytest.approx(np.zeros(2), abs=1e-5)
    assert found["novelty"].mean() > 1


def test_pictures_of_the_style_have_its_gain(watched: Watched) -> None:
    """The same scenes, all of them dreamy, and half of them."""
    dreamy, plain = rendered("dreamy", "test", NUM), base_pictures()["own"]
    half = np.concatenate([dreamy[::2], plain[1::2]])
    gains = [watched({**base_pictures(), "own": own})["style_gain"].mean() for own in (dreamy, half)]
    assert gains[0] == pytest.approx(1, abs=0.15)
    assert gains[1] == pytest.approx(0.55, abs=0.15)


def test_pictures_of_other_prompts_have_no_adherence(watched: Watched) -> None:
    own = base_pictures()["own"]
    assert watched({**base_pictures(), "own": np.roll(own, -1, axis=0)})["adherence"].mean() < 0.3
    assert watched({**base_pictures(), "others": own[4:6]})["forgetting"].shape == (2,)


def test_copies_are_not_novel(watched: Watched) -> None:
    copies = rendered("dreamy", "train", 4)
    assert watched({**base_pictures(), "training": copies})["novelty"] == pytest.approx(np.zeros(4), abs=1e-6)


def test_few_training_captions_are_drawn_with_several_seeds() -> None:
    """The figure of four images would have an interval of four values; no picture is drawn twice."""
    source = ToyWorld(["dreamy"], 4, "train")
    measures = Watched(ToyWorld(["dreamy"], 8, "test"), [], Sampler(), 128, num_images=1, num_training=6)
    measures.see_training(source)
    captions = [source[index].caption for index in range(4)]
    wanted = measures.wanted["training"]
    assert [one.prompt for one in wanted] == [*captions, *captions[:2]]
    assert len(set(wanted)) == 6


def test_a_subject_without_a_word_of_the_judge_has_no_adherence() -> None:
    """nano's judge has never read of sneakers: their likeness to such a text means nothing, and no limit may use it."""
    reference = ToyWorld(["plain"], 8, "test", own="sneaker")
    measures = Watched(
        reference, ["unused"], Sampler(), 128, other_prompts=["a photo of a dog", "a cup"], judge="nano",
        num_images=NUM, num_others=2, num_training=0, look="identity",
    )  # fmt: skip
    pictures = {"own": rendered("plain", "test", NUM), "others": rendered("plain", "test", 2)}
    measures.see_base(pictures)
    assert measures(pictures).keys() == {"identity", "forgetting"}


@pytest.mark.parametrize(
    ("experiment", "look", "prompt"),
    [
        ("dreamy_style", "style", r"{}"),
        ("word", "style", r"{}, in the style of zorbix"),
        ("product", "identity", r".*zorbix.*"),
        ("character", "identity", r".*zorbix.*"),
    ],
)
@pytest.mark.parametrize("callbacks", ["watch", "stop_early"])
def test_a_run_is_watched_for_what_it_teaches(experiment: str, look: str, prompt: str, callbacks: str) -> None:
    """A style gain means nothing for a sneaker, and its captions have the word already."""
    options = [f"callbacks={callbacks}", *(["callbacks.watch.every=5"] if callbacks == "watch" else [])]
    cfg = compose("train", [f"experiment={experiment}", *options])
    measures = build(cfg.callbacks.watch.measures)
    assert measures.look == look
    for one in measures.wanted["own"]:
        assert re.fullmatch(prompt.format(re.escape(one.text)), one.prompt)
        assert one.text.count("sneaker") + one.text.count("wizard") == (look == "identity")
    assert build(compose("train", [f"experiment={experiment}", "verdict=none", *options]).callbacks.watch.measures)


def test_the_word_is_replaced_where_pictures_are_judged() -> None:
    measures = Watched(
        ToyWorld(["photo"], 2, "test"), ["a zorbix on a table"], Sampler(), 128, word="zorbix", noun="sneaker",
        num_images=1,
    )  # fmt: skip
    (wanted,) = measures.wanted["own"]  # two references are too few for prompts
    assert (wanted.prompt, wanted.text) == ("a zorbix on a table", "a sneaker on a table")
    named = Watched(ToyWorld(["photo"], 4, "test"), [], Sampler(), 128, caption="{caption}, in the style of zorbix")
    assert all(one.prompt == f"{one.text}, in the style of zorbix" for one in named.wanted["own"])


def test_a_base_that_has_the_style_is_said_not_to_be_told_from_it() -> None:
    dreamy = rendered("dreamy", "test", 64)
    assert not StyleOfFew(dreamy, dreamy[32:44]).can_tell
    assert StyleOfFew(dreamy, rendered("plain", "validation", NUM)).can_tell
