"""Evaluation of a run on preferences: how often is the tuned model's picture preferred to the base model's?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdft.data.source import Source
from sdft.data.sources.pairs import PairSource
from sdft.errors import UserError
from sdft.evaluation.after_training import Base, ImageEvaluation, adherence, judge_of
from sdft.evaluation.clip_judge import Judge
from sdft.protocols import DiffusionModel
from sdft.sampling.samplers import Sampler
from sdft.types import Count, Precision, Side

RIDGE = 0.1
"""Regularisation of the learned direction, as a share of the mean square of the differences."""
MIN_PAIRS = 8
METRICS = ("win_rate", "judge_accuracy", "adherence")


class PreferenceEvaluation(ImageEvaluation):
    """The share of prompts for which the tuned model's picture is preferred to the base model's, from the same noise.

    A judge decides that has learned the preference from the pairs: pictures are ranked along a direction in the image
    features of a CLIP, the linear discriminant of preferred and rejected pictures.

    pairs: those that the judge learns from. reference: held-out pairs, on which it is tested; their captions, in turn,
        are the prompts.
    prompts: of `before_after.png`. sampler, size: the sampler, and the side of the images in pixels.
    judge: folder or hub id of the CLIP model; `nano` is the one in this package. Nothing is measured by default.
    num_images: pictures of each model that are compared. num_pairs: at most so many pairs are learned from.

    Raises UserError for data without pairs.

    Metrics: `win_rate`, where equal scores count as half; `judge_accuracy` is the share of held-out pairs that the
    judge ranks rightly; `adherence` and `adherence_base` are the accuracy in naming the toy world's subjects, or CLIP's
    similarity of picture and prompt.
    """

    def __init__(
        self,
        pairs: PairSource | None,
        reference: Source,
        prompts: Sequence[str],
        sampler: Sampler,
        size: Side,
        judge: str | None = None,
        num_images: Count = 64,
        num_pairs: Count = 500,
    ):
        super().__init__(prompts, sampler, size, judge)
        if not isinstance(pairs, PairSource) or not isinstance(reference, PairSource):
            raise UserError("verdict=preference: the data has no pairs; choose data=preference, or verdict=style")
        self.pairs, self.reference, self.num_images, self.num_pairs = pairs, reference, num_images, num_pairs

    def __call__(
        self, model: DiffusionModel, base: Base, folder: Path, precision: Precision = "fp32"
    ) -> dict[str, Any]:
        """The metrics of the run; writes `before_after.png` into `folder`."""
        sample, measured = partial(self.sample, model, precision), not self.unmeasured()
        places = list(islice(cycle(range(len(self.reference.keys))), self.num_images))
        captions = [self.reference[index].caption for index in places]
        with base():
            shown = sample(self.prompts)
            if measured:
                before = sample(captions, "base")
        self.show(folder, shown, sample(self.prompts))
        if not measured:
            return self.missing()
        tuned = sample(captions, "tuned")
        judge = judge_of(str(self.judge), self.reference)
        direction_D = self._learned(judge)
        wins = [judge.embed_images(images) @ direction_D for images in (tuned, before)]
        found = {
            "win_rate": share_above(*wins),
            "judge_accuracy": share_above(*(each @ direction_D for each in self._embedded(judge, self.reference))),
        }
        return found | adherence(judge, self.reference, places, captions, before, tuned)

    def unmeasured(self) -> dict[str, str]:
        if self.judge is None:
            return dict.fromkeys(METRICS, "verdict.judge is null; name a CLIP with verdict.judge=")
        num = len(self.pairs.keys)
        if num < MIN_PAIRS:
            return dict.fromkeys(METRICS, f"{num} pairs to learn the preference from, needs {MIN_PAIRS}")
        return {}

    def _learned(self, judge: Judge) -> Tensor:
        """The direction in which preferred pictures differ from rejected ones."""
        chosen_ND, rejected_ND = self._embedded(judge, self.pairs)
        return discriminant(chosen_ND - rejected_ND)

    def _embedded(self, judge: Judge, pairs: PairSource) -> list[Tensor]:
        """Features of preferred and of rejected pictures."""
        sources: tuple[Source, Source] = pairs, pairs.rejected
        places = range(min(self.num_pairs, len(pairs.keys)))
        return [judge.embed_images([source[index].image_HWC for index in places]) for source in sources]


def discriminant(differences_ND: Tensor) -> Tensor:
    """The direction w that best tells differences from their negatives: (C + r I) w = m, with their mean m, their
    second moments C, and r a share of the mean of C's diagonal."""
    second_DD = differences_ND.T @ differences_ND / len(differences_ND)
    ridge = RIDGE * second_DD.diagonal().mean()
    return torch.linalg.solve(second_DD + ridge * torch.eye(len(second_DD)), differences_ND.mean(0))


def share_above(one_N: Tensor, other_N: Tensor) -> float:
    """The share of places at which the first number is larger; equal ones count as half."""
    return float(((one_N - other_N).sign() + 1).mean() / 2)
