"""Evaluation of a run that taught a subject: is it drawn, in new surroundings, and is everything else as before?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdft.data.dataset import Source
from sdft.data.sources.toy import ToyWorld
from sdft.evaluation.after_training import MIN_REFERENCES, Base, ImageEvaluation, adherence, judge_of
from sdft.evaluation.clip_judge import Judge
from sdft.protocols import DiffusionModel
from sdft.sampling.samplers import Sampler
from sdft.types import Count, Precision, Side

METRICS = ("identity", "recognised", "adherence", "forgetting")


class IdentityEvaluation(ImageEvaluation):
    """Identity of the subject and forgetting of others, compared with the base model, by the image features of a CLIP.

    reference: held-out images of the subject. If they are of the toy world, their captions are the prompts that are
        measured, otherwise `prompts` in turn, with several seeds.
    prompts: of `before_after.png`: the subject in surroundings that the training images lack.
    sampler, size: the sampler, and the side of the images in pixels.
    others: images of other subjects, which the toy world has; their captions are the prompts of forgetting.
    other_prompts: the prompts of forgetting where `others` is None.
    word, noun: the new word, and what the subject is, such as `sneaker`.
    judge: folder or hub id of the CLIP model; `nano` is the one in this package. Nothing is measured by default.
    num_images: of the subject, and of the others.

    Metrics: `identity` is 0 for images as similar to the subject as the base model's, and 1 for those as similar as its
    own images are to each other (cosine similarity to their mean). `recognised` is the share of images whose most
    similar one is a held-out image of the subject, and not one of `others` or of the base model's for the same prompts;
    beside it stand the shares of the base model's images, of the others, which should be 0, and of the held-out images
    themselves, which should be 1. `adherence` and `adherence_base` are CLIP's similarity of image and prompt, the word
    replaced by the noun. `forgetting` is by how much the adherence to other prompts fell: of the accuracy in naming the
    toy world's subjects, or of the similarity.
    """

    def __init__(
        self,
        reference: Source,
        prompts: Sequence[str],
        sampler: Sampler,
        size: Side,
        word: str,
        noun: str,
        others: Source | None = None,
        other_prompts: Sequence[str] = (),
        judge: str | None = None,
        num_images: Count = 64,
    ):
        super().__init__(prompts, sampler, size, judge)
        self.reference, self.word, self.noun, self.others = reference, word, noun, others
        if isinstance(reference, ToyWorld):
            measured = [reference[index].caption for index in range(len(reference.keys))]
        else:
            measured = list(prompts)
        self.measured = list(islice(cycle(measured), num_images))
        count = 0 if others is None else min(num_images, len(others.keys))
        spoken = [others[index].caption for index in range(count)] if others is not None else list(other_prompts)
        self.other_prompts = list(islice(cycle(spoken), num_images)) if spoken else []

    def __call__(
        self, model: DiffusionModel, base: Base, folder: Path, precision: Precision = "fp32"
    ) -> dict[str, Any]:
        """The metrics of the run; writes `before_after.png` into `folder`."""
        sample = partial(self.sample, model, precision)
        gaps = self.unmeasured()
        with base():
            shown = sample(self.prompts)
            if "identity" not in gaps:
                before = sample(self.measured, "base")
            if not gaps:
                others_before = sample(self.other_prompts, "base, others")
        self.show(folder, shown, sample(self.prompts))
        if "identity" in gaps:
            return self.missing()
        tuned = sample(self.measured, "tuned")
        judge = judge_of(str(self.judge), self.others)
        found = self._identity(judge, before, tuned) | self._adherence(judge, before, tuned)
        if gaps:
            return found | self.missing()
        return found | self._forgetting(judge, others_before, sample(self.other_prompts, "tuned, others"))

    def unmeasured(self) -> dict[str, str]:
        if self.judge is None:
            return dict.fromkeys(METRICS, "verdict.judge is null; name a CLIP with verdict.judge=")
        num = len(self.reference.keys)
        if num < MIN_REFERENCES:
            why = f"{num} held-out images, needs {MIN_REFERENCES}; hold out more with data.held_out="
            return dict.fromkeys(METRICS, why)
        return {} if self.other_prompts else {"forgetting": "verdict.other_prompts is empty"}

    def _identity(self, judge: Judge, before: np.ndarray, tuned: np.ndarray) -> dict[str, float]:
        own_ND = judge.embed_images([self.reference[index].image_HWC for index in range(len(self.reference.keys))])
        before_ND, tuned_ND = judge.embed_images(before), judge.embed_images(tuned)
        not_own_ND = before_ND
        if self.others is not None:
            others_ND = judge.embed_images([self.others[index].image_HWC for index in range(len(self.others.keys))])
            not_own_ND = torch.cat([before_ND, others_ND])
        centre_D, own = mean_of_subject(own_ND)
        base, now = (float((images * centre_D).sum(1).mean()) for images in (before_ND, tuned_ND))
        found = {
            "identity": (now - base) / max(own - base, 1e-6),
            "recognised": recognised(tuned_ND, own_ND, not_own_ND),
            "recognised_reference": recognised(own_ND, own_ND, not_own_ND),
            "recognised_base": recognised(before_ND, own_ND, not_own_ND),
        }
        if self.others is not None:
            found["recognised_others"] = recognised(others_ND, own_ND, not_own_ND)
        return found

    def _adherence(self, judge: Judge, before: np.ndarray, tuned: np.ndarray) -> dict[str, float]:
        if isinstance(self.others, ToyWorld):  # its judge has no word for the noun
            return {}
        prompts = [prompt.replace(self.word, self.noun) for prompt in self.measured]
        return {
            "adherence": float(judge.similarity(tuned, prompts).mean()),
            "adherence_base": float(judge.similarity(before, prompts).mean()),
        }

    def _forgetting(self, judge: Judge, before: np.ndarray, tuned: np.ndarray) -> dict[str, float]:
        prompts = self.other_prompts
        found = adherence(judge, self.others, range(len(prompts)), prompts, before, tuned)
        after, first = found["adherence"], found["adherence_base"]
        return {"adherence_others": after, "adherence_others_base": first, "forgetting": first - after}


def mean_of_subject(own_ND: Tensor) -> tuple[Tensor, float]:
    """The mean of the images of a subject, as a unit vector, and how similar they are to the mean of the others."""
    total_D = own_ND.sum(0)
    rest_ND = F.normalize(total_D - own_ND, dim=1)
    return F.normalize(total_D, dim=0), float((own_ND * rest_ND).sum(1).mean())


def recognised(images_ND: Tensor, own_MD: Tensor, others_KD: Tensor) -> float:
    """The share of images whose most similar one, other than itself, is the subject's and not another's."""
    to_own_N, to_others_N = (
        torch.where(is_itself(images_ND, found_MD), -1.0, images_ND @ found_MD.T).max(1).values
        for found_MD in (own_MD, others_KD)
    )
    return float((to_own_N > to_others_N).float().mean())


def is_itself(images_ND: Tensor, others_MD: Tensor) -> Tensor:
    """Which images have exactly the features of which others, N x M: an image is not compared with itself."""
    return (images_ND[:, None] == others_MD[None]).all(-1)
