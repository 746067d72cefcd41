"""What nano's judge learns from."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from sdft.batch import Batch
from sdft.models.nano.pretraining import Contrastive, with_another
from sdft.rng import Draws

SUBJECTS = ("cat", "owl", "fairy tale forest", "hot air balloon")
WORDS = ("a", "an", "picture", "of", "and", "red", "cat", "owl", "fairy", "tale", "forest", "hot", "air", "balloon")


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (0, "a picture of a red fairy tale forest and an owl"),
        (1, "a picture of a red hot air balloon and an owl"),
        (3, "a picture of a red cat and a hot air balloon"),
    ],
)
def test_one_subject_of_a_caption_is_replaced(choice: int, expected: str) -> None:
    """Of four ways: two places, and two other subjects for each."""
    assert with_another("a picture of a red cat and an owl", SUBJECTS, 4 * 7**20 + choice) == expected


def test_a_caption_without_a_subject_or_with_all_stays() -> None:
    assert with_another("a picture of a catamaran", SUBJECTS, 5) == "a picture of a catamaran"
    assert with_another("an owl and a cat", ("cat", "owl"), 5) == "an owl and a cat"
    assert with_another("a hot air balloon", SUBJECTS, 1) == "an owl"


def report(captions: list[str], logits: list[list[float]], num_wrong: int):
    """The loss of an objective whose CLIP finds these similarities, and the number of texts it was asked for."""
    asked = []

    def clip(input_ids, pixel_values):
        asked.append(len(input_ids))
        return SimpleNamespace(logits_per_image=torch.tensor(logits))

    num = len(captions)
    keys = tuple(map(str, range(num)))
    pixels = torch.zeros(num, 3, 8, 8)
    batch = Batch(keys, [0] * num, captions, torch.zeros(num) > 0, torch.zeros(num, 6), torch.ones(num), pixels)
    objective = Contrastive(WORDS, subjects=SUBJECTS, num_wrong=num_wrong)
    return objective(clip, batch, Draws(0, keys, [0] * num)), asked  # type: ignore[arg-type]


def test_wrong_captions_are_compared_with_the_images_only() -> None:
    """By hand: two images and two texts with similarity 2 where they belong together, and a wrong text each with 1."""
    found, asked = report(["a red cat", "an owl"], [[2.0, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, 1.0]], 1)
    by_image = math.log(math.exp(2) + 1 + math.e + 1) - 2
    by_text = math.log(math.exp(2) + 1) - 2
    assert asked == [4]
    assert found.per_sample_B.tolist() == pytest.approx([(by_image + by_text) / 2] * 2, rel=1e-6)
    misled, _ = report(["a red cat", "an owl"], [[2.0, 0.0, 3.0, 0.0], [0.0, 2.0, 0.0, 1.0]], 1)
    assert misled.figures["hit"].tolist() == [0.0, 1.0]


def test_equal_texts_share_the_target() -> None:
    """By hand: each of two equal captions has half of the target, and without wrong ones nothing else counts."""
    found, asked = report(["a cat", "a cat"], [[1.0, 3.0], [0.0, 0.0]], 0)
    first = math.log(math.e + math.exp(3)) - 2
    assert asked == [2]
    by_text = (math.log(math.e + 1) - 0.5, math.log(math.exp(3) + 1) - 1.5)
    expected = [(first + by_text[0]) / 2, (math.log(2) + by_text[1]) / 2]
    assert found.per_sample_B.tolist() == pytest.approx(expected, rel=1e-6)
