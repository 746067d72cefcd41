"""The judge: it recognises what it was trained on, normalises images as in training, and can be saved and loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, SiglipConfig, SiglipModel

from sdft.data.sources import ToyWorld
from sdft.data.toy.lexicon import SUBJECTS, VOCABULARY
from sdft.data.toy.stories import sample_scene
from sdft.errors import UserError
from sdft.evaluation.after_training import JudgeEvaluation, calibration_error
from sdft.evaluation.clip_judge import Judge, load_judge, pixels_in_unit_range, watching_judge, with_article
from sdft.models.nano import build

NARROW = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
COLOURS = {"cat": (220, 30, 30), "dog": (30, 200, 40), "car": (40, 60, 230)}


def _flat(subject: str, shift: int = 0) -> np.ndarray:
    return np.full((64, 64, 3), np.array(COLOURS[subject]) + shift, np.uint8)


def _tower(judge: Judge, pixels: Tensor, text: str) -> tuple[Tensor, Tensor]:
    ids = judge.tokenizer([text], padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        out = judge.clip(input_ids=ids, pixel_values=pixels)
    return out.image_embeds, out.text_embeds


def _transformer(seed: int) -> CLIPModel:
    """Random weights of the architecture that CLIPs on the hub have."""
    tokenizer = build.tokenizer(VOCABULARY, "<|endoftext|>")
    both = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = both | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = both | {"image_size": 64, "patch_size": 16}
    torch.manual_seed(seed)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()


@pytest.fixture(scope="module")
def untrained() -> Judge:
    return Judge(_transformer(3), build.tokenizer(VOCABULARY, "<|endoftext|>"), SUBJECTS)


@pytest.fixture(scope="module")
def schooled() -> Judge:
    """A judge that was trained on cats that are red, dogs green and cars blue."""
    clip, tokenizer = build.clip(VOCABULARY, 0), build.tokenizer(VOCABULARY, "<|endoftext|>")
    texts = [f"a picture of a {name}" for name in COLOURS]
    ids = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    images = np.stack([_flat(name, shift) for shift in (-10, 10) for name in COLOURS])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    learner = torch.optim.AdamW(clip.parameters(), lr=2e-3)
    for _ in range(14):
        logits = clip(input_ids=ids, pixel_values=pixels).logits_per_image
        learner.zero_grad()
        torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0, 1, 2])).backward()
        learner.step()
    return Judge(clip, tokenizer, list(COLOURS))


def test_accuracy_is_the_share_of_true_subjects(schooled: Judge) -> None:
    shown = ["cat", "dog", "car", "car", "dog", "cat"]
    images = np.stack([_flat(name, 5) for name in shown])
    assert schooled.subject_accuracy(images, shown) == 1.0
    claimed = ["cat", "dog", "car", "cat", "cat", "cat"]
    assert schooled.subject_accuracy(images, claimed) == pytest.approx(4 / 6)
    assert schooled.subject_hits(images, claimed).tolist() == [True, True, True, False, False, True]
    assert schooled.subject_accuracy(images, ["dog", "car", "cat", "dog", "car", "car"]) == 0.0


def test_both_subjects_of_a_pair_are_named_by_its_most_similar_prompt(schooled: Judge, monkeypatch) -> None:
    """Six prompts for three classes; the images show `a dog and a cat`, `a car and a dog` and `a cat and a car`."""
    order = ["cat dog", "cat car", "dog cat", "dog car", "car cat", "car dog"]
    asked: list[str] = []
    monkeypatch.setattr(schooled, "embed_texts", lambda texts: asked.extend(texts) or torch.eye(6))
    shown = torch.eye(6)[[order.index("dog cat"), order.index("car dog"), order.index("cat car")]]
    monkeypatch.setattr(schooled, "embed_images", lambda images: shown)
    pairs = [("cat", "dog"), ("dog", "car"), ("cat", "dog")]
    assert schooled.both_hits([_flat("cat")] * 3, pairs).tolist() == [True, True, False]
    assert asked == ["a picture of a {} and a {}".format(*names.split()) for names in order]
    with pytest.raises(UserError, match=r"subjects \['owl'\] are not among the judge's classes"):
        schooled.both_hits([_flat("cat")] * 3, [*pairs[:2], ("cat", "owl")])


def test_a_calibrated_judge_is_right_as_often_as_it_is_sure() -> None:
    """Five images of probability 0.8, of which four are right, and two of 0.55, of which none is."""
    right = torch.tensor([True, True, False, True, True])
    assert calibration_error([torch.full((5,), 0.8)], [right]) == pytest.approx(0.0, abs=1e-6)
    both = calibration_error([torch.full((5,), 0.8), torch.full((2,), 0.55)], [right, torch.zeros(2) > 1])
    assert both == pytest.approx(2 * 0.55 / 7, abs=1e-6)
    assert calibration_error([torch.ones(4)], [torch.ones(4) > 0]) == 0.0


def test_an_evaluation_counts_pairs_by_themselves(tmp_path: Path) -> None:
    """An untrained judge names about one in thirty, and almost never both of a pair."""
    source = ToyWorld(["photo"], 60, "test")
    evaluation = JudgeEvaluation({"photo": source}, VOCABULARY)
    found = evaluation(build.clip(VOCABULARY, 0).eval(), None, tmp_path)
    assert {*found} == {"accuracy", "accuracy_photo", "calibration", "both_named"}
    assert found["accuracy"] < 0.25
    assert found["both_named"] < 0.1
    none = ToyWorld(["photo"], 20, "test", own="wizard")
    assert "both_named" not in JudgeEvaluation({"photo": none}, VOCABULARY, ["wizard"])(
        build.clip(VOCABULARY, 0).eval(), None, tmp_path
    )


def test_of_two_subjects_both_are_named(schooled: Judge, monkeypatch) -> None:
    """In the order of the images, of which the second and the fourth show two."""
    monkeypatch.setattr(schooled, "both_hits", lambda images, pairs: torch.tensor([pair[0] == "dog" for pair in pairs]))
    images = [_flat("cat"), _flat("cat"), _flat("dog"), _flat("dog"), _flat("car")]
    subjects = [("cat",), ("dog", "cat"), ("cat",), ("car", "dog"), ("car",)]
    assert schooled.named_hits(images, subjects).tolist() == [True, True, False, False, True]
    assert schooled.named_hits(images[:1], subjects[:1]).tolist() == [True]
    assert schooled.named_hits(images[1:2], subjects[1:2]).tolist() == [True]


def test_what_is_watched_is_judged_by_another() -> None:
    """Two judges of nano that share no weight and err on different images; of a CLIP of the user's there is one."""
    assert watching_judge("nano") == "nano_watching"
    assert watching_judge("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"
    one, two = load_judge("nano", SUBJECTS), load_judge("nano_watching", SUBJECTS)
    assert one.clip.config.vision_config.image_size != two.clip.config.vision_config.image_size
    others = dict(two.clip.named_parameters())
    for name, weight in one.clip.named_parameters():
        assert name not in others or not torch.equal(weight, others[name]), name


def test_the_true_caption_is_the_most_similar(schooled: Judge) -> None:
    images = [_flat(name) for name in COLOURS]
    similarities = {name: schooled.similarity(images, [f"a picture of a {name}"] * 3) for name in COLOURS}
    table = torch.stack(list(similarities.values()), dim=1)
    assert table.argmax(1).tolist() == [0, 1, 2]
    assert (table.diagonal() - (table.sum(1) - table.diagonal()) / 2).min() > 0.2


def test_batches_do_not_matter(schooled: Judge) -> None:
    images, names = [_flat(name, s) for s in range(3) for name in COLOURS], list(COLOURS) * 3
    small = Judge(schooled.clip, schooled.tokenizer, schooled.classes, batch_size=2)
    captions = [f"a {name} in the snow" for name in names]
    assert torch.allclose(small.similarity(images, captions), schooled.similarity(images, captions), atol=1e-5)


def test_embeddings_are_those_of_the_whole_model(untrained: Judge) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    image_D, text_D = _tower(untrained, pixels, "a red cat in the snow")
    assert torch.allclose(untrained.embed_images([image]), image_D, atol=1e-5)
    assert torch.allclose(untrained.embed_texts(["a red cat in the snow"]), text_D, atol=1e-5)
    cosine = untrained.similarity(image[None], ["a red cat in the snow"])
    assert cosine.item() == pytest.approx((image_D * text_D).sum().item(), abs=1e-5)


def test_pixels_lie_between_minus_one_and_one() -> None:
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pixels = pixels_in_unit_range(64)([image], return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(pixels, torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1, atol=1e-6)


def test_larger_pictures_are_averaged_not_skipped() -> None:
    """A board of single black and white pixels is grey from afar; picking every fourth pixel would make it black."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, axis=2)
    pixels = pixels_in_unit_range(64)([board], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    assert pixels.abs().max() < 0.05


def test_prompts_are_worded_as_the_captions_of_the_toy_world() -> None:
    bare = {f"a picture of {with_article(subject)}" for subject in SUBJECTS}
    captions = {sample_scene(0, index).caption for index in range(4000)}
    assert len(bare & captions) > len(SUBJECTS) // 2
    assert with_article("orange cat") == "an orange cat"


def test_a_saved_and_loaded_judge_has_the_same_outputs(untrained: Judge, tmp_path: Path) -> None:
    untrained.clip.save_pretrained(tmp_path)
    untrained.tokenizer.save_pretrained(tmp_path)
    loaded = load_judge(str(tmp_path), SUBJECTS)
    images = np.random.default_rng(2).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    captions = [sample_scene(0, index).caption for index in range(5)]
    assert torch.equal(loaded.similarity(images, captions), untrained.similarity(images, captions))
    assert torch.equal(loaded.embed_texts(captions), untrained.embed_texts(captions))
    assert not loaded.clip.training


def test_images_are_normalised_as_the_folder_is_configured(untrained: Judge, tmp_path: Path) -> None:
    untrained.clip.save_pretrained(tmp_path)
    untrained.tokenizer.save_pretrained(tmp_path)
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=mean, image_std=std
    ).save_pretrained(tmp_path)
    image = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    expected, _ = _tower(untrained, pixels, "a cat")
    loaded = load_judge(str(tmp_path))
    assert torch.allclose(loaded.embed_images([image]), expected, atol=1e-5)
    assert not torch.allclose(untrained.embed_images([image]), expected, atol=1e-3)


def test_a_long_caption_is_cut(untrained: Judge) -> None:
    assert untrained.embed_texts(["a red cat in the snow " * 40]).shape == (1, 24)


def test_judging_leaves_no_gradients(untrained: Judge) -> None:
    assert not untrained.similarity([_flat("cat")], ["a cat"]).requires_grad
    assert all(weight.grad is None for weight in untrained.clip.parameters())


def test_invalid_inputs_are_errors(untrained: Judge, tmp_path: Path) -> None:
    images = [_flat("cat")]
    with pytest.raises(UserError, match=r"subjects \['unicorn'\]"):
        untrained.subject_accuracy(images, ["unicorn"])
    with pytest.raises(UserError, match="one text per image"):
        untrained.similarity(images, ["a cat", "a dog"])
    with pytest.raises(UserError, match="no classes"):
        Judge(untrained.clip, untrained.tokenizer).subject_accuracy(images, ["cat"])
    with pytest.raises(UserError, match="uint8"):
        untrained.similarity([_flat("cat") / 255], ["a cat"])
    with pytest.raises(UserError, match="no judge could be loaded"):
        load_judge(str(tmp_path))


def test_a_judge_may_see_by_convolutions(tmp_path: Path) -> None:
    built = Judge(build.clip(VOCABULARY, 3), build.tokenizer(VOCABULARY, "<|endoftext|>"))
    built.clip.save_pretrained(tmp_path)
    built.tokenizer.save_pretrained(tmp_path)
    judge = load_judge(str(tmp_path), SUBJECTS)
    pixels = 2 * torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 1
    for found, wanted in zip(_tower(judge, pixels, "a cat"), _tower(built, pixels, "a cat"), strict=True):
        torch.testing.assert_close(found, wanted)
    image = np.kron(_flat("cat"), np.ones((2, 2, 1), np.uint8))
    torch.testing.assert_close(judge.embed_images([image]), judge.embed_images([_flat("cat")]))


def test_models_of_another_kind_are_refused(tmp_path: Path) -> None:
    SiglipModel(SiglipConfig(text_config=NARROW, vision_config=NARROW)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no judge could be loaded .*it is a SiglipModel"):
        load_judge(str(tmp_path))


def test_pickles_are_not_opened(untrained: Judge, tmp_path: Path) -> None:
    untrained.clip.config.save_pretrained(tmp_path)
    untrained.tokenizer.save_pretrained(tmp_path)
    torch.save(untrained.clip.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_judge(str(tmp_path))
