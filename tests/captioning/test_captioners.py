"""The embedded judge on the toy world, and the real code of transformers and onnxruntime on small models."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models

from sdft.captioning.captioner import Captioner, JudgeCaptioner
from sdft.captioning.image_to_text import ImageToText
from sdft.captioning.wd_tagger import WDTagger
from sdft.data.sources import ToyWorld
from sdft.errors import UserError

IMAGES = [np.random.default_rng(i).integers(0, 256, (40 + i, 50, 3), dtype=np.uint8) for i in range(4)]


def test_the_judge_names_the_subject_of_toy_pictures() -> None:
    """At least 95 % of the held-out scenes of three looks that show one subject."""
    caption, right, num = JudgeCaptioner(), 0, 0
    for look in ("plain", "photo", "dreamy"):
        world = ToyWorld([look], 120, "validation", caption="{subject}")
        alone = [i for i in range(120) if world.scene(i).other is None]
        texts = caption([world[i].image_HWC for i in alone])
        right += sum(world[i].caption in text for i, text in zip(alone, texts, strict=True))
        num += len(alone)
    assert right >= 0.95 * num > 200


@pytest.mark.parametrize(
    ("make", "prompt"),
    [("blip", ""), ("blip", "a picture of"), ("llava", ""), ("florence", "<DETAILED_CAPTION>")],
)
def test_image_to_text_models(make: str, prompt: str, tmp_path: Path) -> None:
    """One caption an image, of words, the same at every run, alone and in a batch."""
    model = getattr(tiny_models, make)(tmp_path / "model")
    caption = ImageToText(str(model), prompt=prompt, max_new_tokens=12)
    assert isinstance(caption, Captioner)
    texts = caption(IMAGES)
    assert texts == caption(IMAGES) == [caption([image])[0] for image in IMAGES]
    assert len(set(texts)) > 1, "they depend on the image"
    for text in texts:
        assert not {"<s>", "</s>", "<pad>", "[DEC]"} & set(text.split()), text
        assert "Describe this image in one sentence." not in text, "the question is no part of the answer"
        assert text.startswith(prompt) or make == "florence"


def test_a_model_that_is_none_is_told(tmp_path: Path) -> None:
    for model in (str(tmp_path), "no/such-model"):
        with pytest.raises(UserError, match=rf"captioner\.model={model}: no image-to-text model can be loaded"):
            ImageToText(model)


def test_weights_that_could_run_code_are_not_loaded(tmp_path: Path) -> None:
    """Only safetensors: a pickle can hold anything."""
    import torch

    model = tiny_models.blip(tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    with pytest.raises(UserError, match="no image-to-text model can be loaded"):
        ImageToText(str(model))


class TestTagger:
    def test_tags_above_the_thresholds(self, tmp_path: Path) -> None:
        """Characters first, then by probability; ratings never; the colours show that channels are in their places."""
        caption = WDTagger(str(tiny_models.tagger(tmp_path / "tagger")), threshold=0.35, character_threshold=0.6)
        colours = {"red": (250, 0, 0), "blue": (0, 100, 240), "white": (255, 255, 255)}
        images = [np.full((8, 8, 3), colour, np.uint8) for colour in colours.values()]
        assert caption(images) == [
            "red, ^_^",
            "long blue hair, ^_^, green",
            "saber (fate), red, green, long blue hair, ^_^",
        ]
        plain = WDTagger(str(tmp_path / "tagger"), underscores=True)
        assert plain(images[1:2]) == ["long_blue_hair, ^_^, green"]

    def test_the_rest_of_the_square_is_white(self, tmp_path: Path) -> None:
        caption = WDTagger(str(tiny_models.tagger(tmp_path / "tagger")), threshold=0.7)
        wide = np.zeros((8, 32, 3), np.uint8)
        assert caption([wide]) == ["red, green, long blue hair"], "three quarters of it are white"

    def test_what_is_missing_is_named(self, tmp_path: Path, monkeypatch) -> None:
        folder = tiny_models.tagger(tmp_path / "tagger")
        (folder / "selected_tags.csv").write_text("name\nred\n")
        with pytest.raises(UserError, match=r"selected_tags\.csv is no table of tags"):
            WDTagger(str(folder))
        (folder / "selected_tags.csv").write_text("name,category\nred,0\n")
        with pytest.raises(UserError, match="has 7 outputs and a table of 1 tags"):
            WDTagger(str(folder))(IMAGES)
        (folder / "model.onnx").write_bytes(b"oops")
        with pytest.raises(UserError, match=r"model\.onnx cannot be loaded"):
            WDTagger(str(folder))
        (folder / "model.onnx").unlink()
        with pytest.raises(UserError, match=r"the folder lacks model\.onnx"):
            WDTagger(str(folder))
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(UserError, match=r"pip install 'sdft\[tagger\]'"):
            WDTagger(str(folder))
