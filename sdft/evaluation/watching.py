"""What is measured on pictures while a run goes on: a few pictures of fixed prompts and seeds, the same every time.

Every figure is one value for each picture, or for each that is left out of a set, relative to that of the base model's
picture: so the base and two measurements of one run are compared in pairs (`sdft.evaluation.statistics`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdft.data.dataset import ImageDataset, Source, batches
from sdft.data.images import to_uint8
from sdft.data.sources.toy import ToyWorld
from sdft.evaluation.after_training import MIN_REFERENCES
from sdft.evaluation.clip_judge import Judge, load_judge, watching_judge
from sdft.evaluation.identity import mean_of_subject
from sdft.evaluation.metrics.similarity import THUMBNAILS, relative_novelty
from sdft.evaluation.results import MetricInfo
from sdft.evaluation.statistics import pseudo_values
from sdft.evaluation.style_distance import Projections, SlicedWasserstein, set_distance, sort_projections
from sdft.protocols import DiffusionModel
from sdft.sampling.generate import generate
from sdft.sampling.samplers import Sampler
from sdft.types import Count, Index, Precision, Side

FIGURES = {
    info.name: info
    for info in (
        MetricInfo("style_gain", "style gain", "higher", "0 is the base, 1 the images of the style."),
        MetricInfo("identity", "identity", "higher", "0 is the base, 1 the images of the subject."),
        MetricInfo("adherence", "prompt adherence", "higher", "1 is the base, 0 is an image of another prompt."),
        MetricInfo("forgetting", "forgetting", "lower", "Adherence that other prompts have lost."),
        MetricInfo("novelty", "novelty", "higher", "Distance to the nearest training image; a copy is near 0."),
    )
}
"""Name -> label, direction and meaning. The first two are what is learned, the others what it costs."""
LOOKS = ("style_gain", "identity")
MAX_REFERENCES, MAX_TRAINING = 128, 2000
"""Images that are read: more cost memory, and time before the first step."""

Values = dict[str, np.ndarray]
"""Figure -> one value for each picture, or for each that is left out."""


class Wanted(NamedTuple):
    """A picture: its prompt, the text that it is judged by, and its seed."""

    prompt: str
    text: str
    seed: int


class Watched:
    """Draws a few pictures and measures them.

    reference: held-out images of what is trained; their captions are the prompts if there are at least 4, otherwise
        `prompts`, and what is learned cannot be measured.
    prompts, other_prompts: with what is trained, and away from it.
    sampler, size: the sampler, and the side of the pictures in pixels.
    caption: template of the trained prompts of a style, with `{caption}`; those of a subject have its word already.
    word, noun: a new word, and the plain word that stands for it in the texts by which pictures are judged.
    look: `style` measures the style gain, `identity` the similarity to the subject in the features of the judge. By
        default that of a subject if there is a word for it.
    judge: folder or hub id of a CLIP model; with `nano`, another one of this package watches than measures the result.
        Without one there are no identity, no adherence and no forgetting.
    num_images, num_others, num_training: pictures of trained prompts, of others, and of captions of training images;
        where there are fewer images, several of each caption, with other seeds.
    """

    def __init__(
        self,
        reference: Source,
        prompts: Sequence[str],
        sampler: Sampler,
        size: Side,
        other_prompts: Sequence[str] = (),
        caption: str = "{caption}",
        word: str | None = None,
        noun: str | None = None,
        look: Literal["style", "identity"] | None = None,
        judge: str | None = None,
        num_images: Count = 12,
        num_others: Index = 6,
        num_training: Index = 8,
    ):
        self.reference, self.sampler, self.size, self.judge = reference, sampler, size, judge
        self.look = look or ("style" if word is None else "identity")
        caption = caption if self.look == "style" else "{caption}"
        self.num_training, self.caption = num_training, caption
        plain = [reference[i].caption for i in range(min(num_images, len(reference.keys)))] or list(prompts)
        if len(reference.keys) < MIN_REFERENCES:
            plain = list(prompts)
        own = [self._wanted(text, caption, word, noun, seed) for seed, text in _first(plain, num_images)]
        others = [Wanted(text, text, seed) for seed, text in _first(other_prompts, num_others)]
        self.wanted = {"own": own, "others": others, "training": list[Wanted]()}
        self._judge: Judge | None = None
        self._training_source: Source | None = None
        self._training: Tensor | None = None
        self._look: StyleOfFew | IdentityOfFew | None = None
        self._base: dict[str, tuple[np.ndarray, float]] = {}

    @staticmethod
    def _wanted(text: str, caption: str, word: str | None, noun: str | None, seed: int) -> Wanted:
        prompt = caption.format(caption=text)
        return Wanted(prompt, text.replace(word, noun) if word and noun else text, seed)

    @property
    def num_pictures(self) -> int:
        """Pictures of one measurement."""
        return sum(map(len, self.wanted.values()))

    def see_training(self, source: Source) -> None:
        """Of which images copies are looked for, once the base was seen. The captions of the first are prompts."""
        captions = [source[index].caption for index in range(min(self.num_training, len(source.keys)))]
        if not captions:
            return
        self.wanted["training"] = [Wanted(text, text, seed) for seed, text in _first(captions, self.num_training)]
        self._training_source = source

    def draw(
        self, model: DiffusionModel, precision: Precision = "fp32", only: slice = slice(None)
    ) -> dict[str, np.ndarray]:
        """The pictures of each set, uint8 N x H x W x 3. only: of the pictures of all sets, those at these places."""
        flat = [(name, wanted) for name, of_set in self.wanted.items() for wanted in of_set][only]
        prompts, seeds = [wanted.prompt for _, wanted in flat], [wanted.seed for _, wanted in flat]
        images = generate(model, prompts, seeds, self.sampler, (self.size, self.size), precision)
        found: dict[str, list[np.ndarray]] = {}
        for (name, _), image in zip(flat, images, strict=True):
            found.setdefault(name, []).append(image)
        return {name: np.stack(of_set) for name, of_set in found.items()}

    def see_base(self, pictures: dict[str, np.ndarray]) -> None:
        """What later pictures are compared with: those of the model before training."""
        if self.judge is not None:
            self._judge = load_judge(watching_judge(self.judge))
        if self._training_source is not None:
            images = square_images(self._training_source, self.size, MAX_TRAINING)
            self._training = torch.cat([THUMBNAILS(batch) for batch in images])
        if len(self.reference.keys) >= MIN_REFERENCES:
            references = np.concatenate(list(square_images(self.reference, self.size, MAX_REFERENCES)))
            if self.look == "style":
                look = StyleOfFew(references, pictures["own"], side=min(self.size, max(64, self.size // 4)))
                self._look = look if look.can_tell else None
            elif self._judge is not None:
                self._look = IdentityOfFew(self._judge, references, pictures["own"])
        # The judge of the toy world has no word for the subjects that are taught to nano.
        judged = ("others",) if self.look == "identity" and isinstance(self.reference, ToyWorld) else ("own", "others")
        for name in judged:
            if self._judge is not None and len(self.wanted[name]) > 1:
                texts = [wanted.text for wanted in self.wanted[name]]
                own_N = self._judge.similarity(pictures[name], texts).numpy()
                chance = self._judge.similarity(pictures[name], [*texts[1:], texts[0]]).mean().item()
                self._base[name] = own_N, max(float(own_N.mean()) - chance, 1e-6)

    def __call__(self, pictures: dict[str, np.ndarray]) -> Values:
        """The figures of a measurement, by the names of `FIGURES`."""
        found: Values = {}
        if self._look is not None:
            found["style_gain" if self.look == "style" else "identity"] = self._look(pictures["own"])
        if "own" in self._base:
            found["adherence"] = self._retained("own", pictures["own"])
        if "others" in self._base:
            found["forgetting"] = 1 - self._retained("others", pictures["others"])
        if self._training is not None:
            found["novelty"] = relative_novelty(THUMBNAILS(pictures["training"]), self._training)
        return found

    def _retained(self, name: str, pictures: np.ndarray) -> np.ndarray:
        """The similarity of pictures to their texts: 1 is the base's, 0 the mean of the base with other texts."""
        assert self._judge is not None
        base_N, span = self._base[name]
        texts = [wanted.text for wanted in self.wanted[name]]
        return 1 + (self._judge.similarity(pictures, texts).numpy() - base_N) / span


class StyleOfFew:
    """The style gain of small sets of one size, as pseudo-values: their mean is the gain of the set.

    It is not measured where the base draws the style already.

    The reference is split in halves. Every set is measured against the second, and the floor is the mean distance of
    groups of the first that are as small. (The prompts are captions of the first: what a set shows must not matter.)

    reference, base: images of the style, and of the base model. side: as in `SlicedWasserstein`.
    """

    def __init__(self, reference: np.ndarray, base: np.ndarray, side: int = 64):
        self.distance = SlicedWasserstein(reference, base, side)
        half, size = len(reference) // 2, len(base)
        projections = self.distance.reference
        self._target = sort_projections({name: values[half:] for name, values in projections.items()})
        size = min(size, half)
        starts = range(0, half - size + 1, size)
        floors = [{name: values[at : at + size] for name, values in projections.items()} for at in starts]
        self._floor = float(np.mean([set_distance(sort_projections(group), self._target).d for group in floors]))
        every = np.arange(len(base))
        self._base = self._distance(self.distance.contrast, every)
        self._base_N = pseudo_values(lambda rows: self._distance(self.distance.contrast, rows), range(len(base)))
        self.can_tell = self._base > self._floor
        """Whether the base is farther from the style than its own images are from each other."""

    def __call__(self, images: np.ndarray) -> np.ndarray:
        projections = self.distance.projections(images)
        now_N = pseudo_values(lambda rows: self._distance(projections, rows), range(len(images)))
        return (self._base_N - now_N) / (self._base - self._floor)

    def _distance(self, projections: Projections, rows: np.ndarray) -> float:
        """Of some images to the reference."""
        chosen = sort_projections({name: values[rows] for name, values in projections.items()})
        return set_distance(chosen, self._target).d


class IdentityOfFew:
    """The similarity of each image to a subject by image features: 0 is the base, 1 that of its own images."""

    def __init__(self, judge: Judge, reference: np.ndarray, base: np.ndarray):
        self.judge = judge
        self._centre_D, self._own = mean_of_subject(judge.embed_images(reference))
        self._base_N = (judge.embed_images(base) @ self._centre_D).numpy()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        now_N = (self.judge.embed_images(images) @ self._centre_D).numpy()
        return (now_N - self._base_N) / max(self._own - float(self._base_N.mean()), 1e-6)


def square_images(source: Source, size: int, most: int) -> Iterator[np.ndarray]:
    """Batches of the images of a source, at most `most`, resized and cropped: uint8 B x size x size x 3."""
    for batch in batches(ImageDataset(source, (size, size), seed=0), range(min(len(source.keys), most)), 16):
        assert batch.pixels_BCHW is not None
        yield to_uint8(batch.pixels_BCHW)


def _first(texts: Sequence[str], count: int) -> list[tuple[int, str]]:
    """`count` texts in turn, with a seed for each."""
    return list(enumerate(islice(cycle(texts), count))) if texts else []
