"""The toy world: pure, captioned truthfully, split disjointly, and drawn alike by every look."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sdft.data.toy.layout import lay_out
from sdft.data.toy.lexicon import SUBJECTS
from sdft.data.toy.rendering import LOOKS, render
from sdft.data.toy.scenes import SPLITS, WIDE_SUBJECTS, Scene, split_index
from sdft.data.toy.stories import sample_scene

SAMPLE = range(400)


def _scene_with(subject: str, **wanted: str) -> Scene:
    for index in range(20000):
        scene = sample_scene(5, index)
        bare = not (scene.other or scene.worn or scene.finish or scene.pose)
        if scene.subject == subject and bare and all(getattr(scene, name) == value for name, value in wanted.items()):
            return scene
    raise AssertionError(f"no scene with {subject} and {wanted}")


def _subject_pixels(scene: Scene, look: str) -> np.ndarray:
    """Pixels in the middle of the subject's box."""
    x0, y0, x1, y1 = (np.array(lay_out(scene).box) * 128).astype(int)
    dx, dy = (x1 - x0) // 4, (y1 - y0) // 4
    return render(scene, look)[y0 + dy:y1 - dy, x0 + dx:x1 - dx].reshape(-1, 3).astype(float)


@pytest.mark.parametrize("look", LOOKS)
def test_render_is_pure(look: str) -> None:
    first = [render(sample_scene(3, index), look).tobytes() for index in range(6)]
    again = [render(sample_scene(3, index), look).tobytes() for index in reversed(range(6))]
    assert first == again[::-1]
    assert len(set(first)) == 6


def test_scenes_depend_on_seed_and_index_only() -> None:
    assert sample_scene(1, 9) == sample_scene(1, 9)
    assert sample_scene(1, 9) != sample_scene(2, 9)
    assert sample_scene(1, 9) != sample_scene(1, 10)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_shape_and_type(size: int) -> None:
    for look in LOOKS:
        image = render(sample_scene(0, 4), look, size)
        assert image.shape == (size, size, 3)
        assert image.dtype == np.uint8


def test_unknown_look_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown look"):
        render(sample_scene(0, 0), "cubist")


def test_splits_are_disjoint() -> None:
    indices = {split: {split_index(split, i) for i in range(500)} for split in SPLITS}
    assert all(len(found) == 500 for found in indices.values())
    assert len(set.union(*indices.values())) == 500 * len(SPLITS)
    with pytest.raises(ValueError, match="not in tuple"):
        split_index("holiday", 0)
    with pytest.raises(ValueError, match="negative"):
        split_index("train", -1)


def test_held_out_pictures_are_not_copies() -> None:
    pictures = {split: [render(sample_scene(0, split_index(split, i)), "photo") for i in range(40)] for split in SPLITS}
    train = np.stack(pictures["train"]).astype(float)
    for picture in pictures["test"] + pictures["validation"]:
        assert np.abs(train - picture).mean(axis=(1, 2, 3)).min() > 2.0


def test_many_scenes_are_simple_and_central() -> None:
    scenes = [sample_scene(0, index) for index in SAMPLE]
    simple = [scene.place == "studio" and scene.position in ("", "centre") for scene in scenes]
    assert 0.2 < np.mean(simple) < 0.45


@pytest.mark.parametrize("subject", [name for name in SUBJECTS if name not in WIDE_SUBJECTS])
def test_subject_lies_inside_the_picture(subject: str) -> None:
    for index in range(600):
        scene = sample_scene(8, index)
        if scene.subject == subject and scene.other is None:
            assert min(lay_out(scene).box) >= -0.001
            assert max(lay_out(scene).box) <= 1.001


@pytest.mark.parametrize("position", ["left", "right"])
def test_stated_side_is_the_drawn_side(position: str) -> None:
    for index in range(300):
        scene = sample_scene(0, index)
        if scene.position == position:
            x0, _, x1, _ = lay_out(scene).box
            assert ((x0 + x1) / 2 < 0.5) == (position == "left")


def test_looks_differ_but_share_geometry() -> None:
    """A subject mirrored to the other side changes each look where, and only where, it changes the others."""
    scene = replace(_scene_with("star", place="studio", position="left"), y=0.5)
    other = replace(scene, x=1.0 - scene.x)
    moved = {look: np.abs(render(scene, look).astype(float) - render(other, look)).mean(axis=2) for look in LOOKS}
    columns = {look: change.mean(axis=0) for look, change in moved.items()}
    x0, _, x1, _ = (128 * np.array(lay_out(scene).box)).astype(int)
    for change in columns.values():
        assert change[x0 + 2:x1 - 2].mean() > 2.0 * change[:max(x0 - 8, 1)].mean()
    images = [render(scene, look).astype(float) for look in LOOKS]
    for i, first in enumerate(images):
        for second in images[i + 1:]:
            assert np.abs(first - second).mean() > 12.0


def test_looks_have_their_own_light() -> None:
    for index in range(12):
        scene = sample_scene(2, index)
        means = {look: render(scene, look).mean() for look in LOOKS}
        assert means["technomant"] < 90 < min(means["plain"], means["dreamy"])
        spread = {look: render(scene, look).astype(float).std() for look in ("plain", "photo")}
        assert spread["plain"] < spread["photo"]


@pytest.mark.parametrize(("colour", "channel"), [("red", 0), ("green", 1), ("blue", 2)])
@pytest.mark.parametrize("subject", ["car", "star", "robot"])
def test_stated_colour_is_visible(subject: str, colour: str, channel: int) -> None:
    pixels = _subject_pixels(_scene_with(subject, colour=colour, place="studio"), "photo")
    others = np.delete(pixels, channel, axis=1).max(axis=1)
    assert np.mean(pixels[:, channel] > others + 25) > 0.35
