"""Sampled scenes: pure, captioned truthfully, and drawn as their captions say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from sdft.data.sources import ToyWorld
from sdft.data.toy import layout
from sdft.data.toy.landmarks import subject_parts
from sdft.data.toy.layout import lay_out
from sdft.data.toy.lexicon import (
    ACTIONS,
    CLOTHES,
    FINISHES,
    POSITION_PHRASES,
    RELATIONS,
    SUBJECTS,
    TIME_PHRASES,
    VOCABULARY,
    WEARERS,
)
from sdft.data.toy.rendering import LOOKS, render
from sdft.data.toy.scenes import WIDE_SUBJECTS, Scene
from sdft.data.toy.stories import PAIRS, sample_scene
from sdft.evaluation.clip_judge import with_article
from sdft.models.nano.build import tokenizer

SCENES = [sample_scene(0, index) for index in range(1500)]


def scenes_with(wanted: Callable[[Scene], bool], count: int = 8) -> Iterator[Scene]:
    found = [scene for scene in SCENES if wanted(scene)][:count]
    assert len(found) >= min(count, 3)
    return iter(found)


def plain_scene(subject: str) -> Scene:
    """The subject alone in the middle of a studio."""
    scene = next(
        scene for scene in SCENES
        if scene.place == "studio" and not scene.other and not scene.position and not scene.size_word
    )  # fmt: skip
    return replace(scene, subject=subject, colour="orange", pose="", worn="", finish="", y=0.5)


def test_scenes_depend_on_seed_and_index_only() -> None:
    assert sample_scene(1, 9) == sample_scene(1, 9)
    assert len({sample_scene(seed, index).caption for seed in (1, 2) for index in (9, 10)}) == 4
    assert all(render(SCENES[i], look).tobytes() == render(SCENES[i], look).tobytes() for i in (3, 4) for look in LOOKS)


def test_the_share_of_pairs_can_be_set_and_leaves_other_scenes_as_they_are() -> None:
    singles = [scene for scene in SCENES[:300] if scene.other is None]
    assert [sample_scene(0, scene.index, pairs=0.0) for scene in singles] == singles
    half = ToyWorld(["plain"], 400, "train", pairs=0.5)
    num_pairs = sum(half.scene(index).other is not None for index in range(400))
    assert abs(num_pairs - 200) < 3 * 10  # the standard deviation is 10
    assert all(sample_scene(0, index, pairs=1.0).other is not None for index in range(50))
    assert all(sample_scene(0, index, own="sneaker", pairs=1.0).other is None for index in range(50))


def test_templates_give_subjects_their_articles() -> None:
    """A judge that learned from `a owl`, and that `an owl` is wrong, named neither owls nor umbrellas."""
    world = ToyWorld(["plain"], 300, "train", caption="a picture of a {subject}", size=32)
    named = {world.scene(index).subjects: world[index].caption for index in range(300)}
    assert named[("owl",)] == "a picture of an owl"
    assert named[("umbrella",)] == "a picture of an umbrella"
    assert named[("cat",)] == "a picture of a cat"
    judged = {subjects: f"a picture of {' and '.join(map(with_article, subjects))}" for subjects in named}
    assert named == judged


def test_there_are_thirty_subjects_and_all_that_can_be_said_occurs() -> None:
    assert len(SUBJECTS) == 30
    assert {scene.subject for scene in SCENES} == set(SUBJECTS)
    assert {scene.relation for scene in SCENES} == {"", *RELATIONS}
    assert {scene.finish for scene in SCENES} == {"", *(name for names in FINISHES.values() for name in names)}
    assert {scene.pose for scene in SCENES} == {"", *(name for names in ACTIONS.values() for name in names)}
    assert {scene.worn for scene in SCENES} == {"", *CLOTHES}
    assert {scene.time for scene in SCENES} == set(TIME_PHRASES)
    assert abs(np.mean([scene.other is not None for scene in SCENES]) - PAIRS) < 0.04


def test_captions_are_of_known_words_and_tell_the_facts() -> None:
    for scene in SCENES:
        words = scene.caption.replace(",", " ,").split()
        assert set(words) <= set(VOCABULARY)
        assert re.fullmatch(r"[a-z]+(,? [a-z]+)*", scene.caption)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", scene.caption.replace("a uni", ""))
        assert scene.subject in scene.caption
        facts = [
            scene.finish,
            scene.pose,
            scene.worn,
            scene.other and scene.other.subject,
            scene.other and scene.other.finish,
        ]
        for fact in facts:
            if fact and not (scene.relation and fact == scene.pose):
                assert fact in scene.caption
        if scene.relation:
            assert any(f" {phrase} " in scene.caption for phrase in RELATIONS[scene.relation])
        for position, phrases in POSITION_PHRASES.items():
            if any(phrase in scene.caption for phrase in phrases):
                assert scene.position == position
        if "time" in scene.stated:
            assert any(phrase in scene.caption for phrase in TIME_PHRASES[scene.time])


def test_a_colour_that_is_said_is_the_colour() -> None:
    for scene in scenes_with(lambda scene: "colour" in scene.stated, 300):
        assert re.search(rf"{scene.colour} ({scene.pose} )?{scene.subject}", scene.caption)
    for scene in scenes_with(lambda scene: "other_colour" in scene.stated, 300):
        assert scene.other is not None
        assert f"{scene.other.colour} {scene.other.subject}" in scene.caption


def test_each_word_is_one_token() -> None:
    known = tokenizer(VOCABULARY, "!")
    assert len(VOCABULARY) < 200
    for word in VOCABULARY:
        assert len(known(word).input_ids) == 3


@pytest.mark.parametrize("relation", RELATIONS)
def test_pairs_stand_as_the_caption_says(relation: str) -> None:
    for scene in scenes_with(lambda scene: scene.relation == relation, 40):
        assert scene.other is not None
        far, near = lay_out(scene).boxes
        middle = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in (near, far)]
        if scene.other.subject not in WIDE_SUBJECTS:
            assert all(low >= -0.001 and high <= 1.03 for box in (far, near) for low, high in (box[::2], box[1::2]))
        if relation == "on":
            assert near[3] < far[3] - 0.1
            assert far[0] - 0.05 < middle[0][0] < far[2] + 0.05
            assert near[3] > far[1]
        if relation == "above":
            assert near[3] < far[1] + 0.12
            assert middle[0][1] < middle[1][1] - 0.2
        if relation == "beside":
            assert abs(middle[0][0] - middle[1][0]) > 0.3
            assert min(near[2], far[2]) - max(near[0], far[0]) < 0.02
        if relation == "before":
            assert scene.place != "sea"
            assert near[3] > far[3] or scene.other.subject in WIDE_SUBJECTS
            assert near[3] - near[1] < far[3] - far[1]
        if relation == "under":
            assert near[1] > far[1] + 0.2


@pytest.mark.parametrize("subject", [name for name in SUBJECTS if name not in WIDE_SUBJECTS])
def test_details_lie_on_the_subject(subject: str, monkeypatch) -> None:
    """They change the drawing where it is, and neither move nor enlarge it by much."""
    scene, size = plain_scene(subject), 128
    box, detailed = np.array(lay_out(scene).box), render(scene, "photo", size).astype(float)
    monkeypatch.setattr(layout, "detailed_parts", lambda subject, *_, **__: subject_parts(subject))
    if subject not in ("castle",):  # flags rise above its towers
        assert np.abs(box - np.array(lay_out(scene).box)).max() < 0.07
    changed = np.abs(detailed - render(scene, "photo", size)).max(axis=2) > 12
    x0, y0, x1, y1 = (size * box).astype(int)
    outside = changed.copy()
    outside[max(y0 - 4, 0) : y1 + 8, max(x0 - 8, 0) : x1 + 8] = False
    assert not outside.any()


@pytest.mark.parametrize(("subject", "finish"), [(name, finish) for name in FINISHES for finish in FINISHES[name]])
def test_a_finish_can_be_seen(subject: str, finish: str) -> None:
    scene = replace(plain_scene(subject), colour="white")
    covered = render(replace(scene, finish=finish), "photo", 128).astype(float)
    x0, y0, x1, y1 = (128 * np.array(lay_out(scene).box)).astype(int)
    change = np.abs(covered - render(scene, "photo", 128)).max(axis=2)
    assert (change[y0:y1, x0:x1] > 15).mean() > 0.04


@pytest.mark.parametrize("subject", WEARERS)
@pytest.mark.parametrize("worn", CLOTHES)
def test_clothes_have_their_colour(subject: str, worn: str) -> None:
    scene = replace(plain_scene(subject), colour="white", worn=worn, worn_colour="blue")
    image = render(scene, "photo", 128).astype(float)
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    shown = (blue > red + 60) & (blue > green + 40) if worn != "crown" else (red > blue + 90) & (green > blue + 50)
    assert shown.sum() > 60


def test_weather_changes_the_picture() -> None:
    scene = replace(plain_scene("house"), place="grass", time="day", y=0.88)
    day, fog, rain = (render(replace(scene, time=time), "photo", 128).astype(float) for time in ("day", "fog", "rain"))
    assert fog[:40].std() < 0.4 * day[:40].std()
    assert rain[:40].mean() < day[:40].mean() - 40


def test_brand_has_five_colours_and_ink_is_grey_but_for_its_seal() -> None:
    for scene in SCENES[:12]:
        flat = render(scene, "brand", 128).reshape(-1, 3)
        _rounded, counts = np.unique(flat // 24, axis=0, return_counts=True)
        assert np.sort(counts)[::-1][:8].sum() > 0.6 * len(flat)
        paper = render(scene, "ink", 128).astype(float)
        saturated = (paper.max(axis=2) - paper.min(axis=2)) > 60
        assert 60 < saturated[108:, 108:].sum() == saturated.sum()


def test_the_source_names_what_it_shows() -> None:
    source = ToyWorld(["photo"], 60, "train", "a picture of a {subject}")
    pair = next(index for index in range(60) if source.scene(index).other is not None)
    scene = source.scene(pair)
    assert source[pair].caption == f"a picture of a {scene.subject} and a {scene.other.subject}"
    assert source.keys[0] == "toy/photo/train/0"


@pytest.mark.parametrize("own", ["sneaker", "wizard"])
def test_own_subjects_are_alone_and_called_by_their_name(own) -> None:
    source = ToyWorld(["photo"], 30, "train", own=own, name="zorbix")
    assert all(source.scene(i).subject == own and source.scene(i).other is None for i in range(30))
    assert all("zorbix" in source[i].caption and own not in source[i].caption for i in range(30))
