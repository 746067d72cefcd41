"""The contract of captioners, and the one that is always there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from sdft.evaluation.clip_judge import load_judge, with_article
from sdft.types import BatchSize


@runtime_checkable  # so that the config check tells a captioner from a number
class Captioner(Protocol):
    """Describes images.

    batch_size: images that are given at a time.
    """

    batch_size: int

    def __call__(self, images: Sequence[np.ndarray]) -> list[str]:
        """A caption for each image; uint8, H x W x RGB, of any sizes."""


class JudgeCaptioner:
    """The most similar of some sentences by a CLIP model; by default nano's judge, on the pictures of the toy world.

    judge: `nano`, or a folder or hub id of a CLIP model.
    subjects: the nouns to choose from; those of the toy world if None.
    prompt: the caption; `{noun}` is the subject with its article.
    """

    def __init__(
        self,
        judge: str = "nano",
        subjects: Sequence[str] | None = None,
        prompt: str = "a picture of {noun}",
        batch_size: BatchSize = 64,
    ):
        from sdft.data.toy.lexicon import KINDS

        self.judge, self.batch_size = load_judge(judge), batch_size
        self.texts = [prompt.format(noun=with_article(name)) for name in subjects or KINDS]
        self._texts_KD = self.judge.embed_texts(self.texts)

    def __call__(self, images: Sequence[np.ndarray]) -> list[str]:
        chosen = (self.judge.embed_images(images) @ self._texts_KD.T).argmax(1)
        return [self.texts[place] for place in chosen.tolist()]
