"""The judge: a CLIP model that scores images against texts, for prompt adherence and as a feature extractor.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, VisionTextDualEncoderModel

from sdft.errors import UserError
from sdft.models.nano import WEIGHTS as NANO
from sdft.models.nano.build import with_flat_features
from sdft.types import BatchSize

NANO_JUDGES = {"nano": NANO / "clip", "nano_watching": NANO / "clip_watching"}
Clip: TypeAlias = CLIPModel | VisionTextDualEncoderModel
"""A text model of CLIP beside a vision transformer, or beside any image model of transformers."""
Images = np.ndarray | Sequence[np.ndarray]
"""uint8 RGB, N x H x W x 3 or a sequence of H x W x 3."""


class Judge:
    """A CLIP model with its tokenizer and image processor.

    clip, tokenizer: of one model.
    classes: the classes of `subject_accuracy`; accuracies over different classes are not comparable.
    processor: resizes (bicubic, antialiased, shorter edge), crops and normalises images. By default, to the size of
        the vision model and to pixels in [-1, 1], as the nano judge was trained.
    prompt: template of the text for a class; `{noun}` is the class with its article.
    batch_size: images or texts per forward pass.
    """

    def __init__(
        self,
        clip: Clip,
        tokenizer: CLIPTokenizer,
        classes: Sequence[str] | None = None,
        processor: CLIPImageProcessorPil | None = None,
        prompt: str = "a picture of {noun}",
        batch_size: BatchSize = 64,
    ):
        self.clip, self.tokenizer, self.prompt, self.batch_size = clip.eval(), tokenizer, prompt, batch_size
        self.classes = None if classes is None else tuple(classes)
        self.processor = processor or pixels_in_unit_range(clip.config.vision_config.image_size)

    def subject_accuracy(self, images: Images, subjects: Sequence[str]) -> float:
        """Zero-shot classification: the share of images whose most similar class is the given subject."""
        return self.subject_hits(images, subjects).float().mean().item()

    def subject_hits(self, images: Images, subjects: Sequence[str]) -> Tensor:
        """Whether the most similar class of each image is its subject, N bools."""
        _check_counts(images, subjects)
        chosen_N = self.class_similarities(images).argmax(1)
        return chosen_N == self.numbers_of(subjects)

    def class_similarities(self, images: Images) -> Tensor:
        """Cosine similarity of each image with the prompt of each class, N x K."""
        return self.embed_images(images) @ self._class_texts_KD.T

    def numbers_of(self, subjects: Sequence[str]) -> Tensor:
        """The places of subjects among the classes."""
        classes = self.classes or ()
        if unknown := set(subjects) - set(classes):
            raise UserError(f"subjects {sorted(unknown)} are not among the judge's classes {list(classes)}")
        return torch.tensor([classes.index(subject) for subject in subjects], dtype=torch.long)

    def both_hits(self, images: Images, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """Whether, of the prompts for all pairs of classes in both orders, the most similar one names the two subjects
        of the image, N bools."""
        _check_counts(images, pairs)
        wanted_N2 = torch.stack([self.numbers_of(pair) for pair in pairs])
        orders_P2, texts_PD = self._pair_texts
        chosen_N2 = orders_P2[(self.embed_images(images) @ texts_PD.T).argmax(1)]
        return (chosen_N2.sort(1).values == wanted_N2.sort(1).values).all(1)

    def named_hits(self, images: Images, subjects: Sequence[tuple[str, ...]]) -> Tensor:
        """Whether the subject of each image is named or, of images with two subjects, both are, N bools."""
        _check_counts(images, subjects)
        hits_N = torch.zeros(len(images), dtype=torch.bool)
        singles = [place for place, of_image in enumerate(subjects) if len(of_image) == 1]
        pairs = [place for place, of_image in enumerate(subjects) if len(of_image) == 2]
        if singles:
            hits_N[singles] = self.subject_hits([images[k] for k in singles], [subjects[k][0] for k in singles])
        if pairs:
            both = [(subjects[k][0], subjects[k][1]) for k in pairs]
            hits_N[pairs] = self.both_hits([images[k] for k in pairs], both)
        return hits_N

    def _known_classes(self) -> tuple[str, ...]:
        if not self.classes:
            raise UserError("the judge has no classes; pass the list of possible subjects")
        return self.classes

    @cached_property
    def _class_texts_KD(self) -> Tensor:
        return self._embed_nouns([with_article(name) for name in self._known_classes()])

    @cached_property
    def _pair_texts(self) -> tuple[Tensor, Tensor]:
        """All pairs of classes in both orders, P x 2, and their texts, P x D: 870 for thirty classes, embedded once."""
        names = [with_article(name) for name in self._known_classes()]
        orders_P2 = torch.tensor(list(permutations(range(len(names)), 2)))
        return orders_P2, self._embed_nouns([f"{names[one]} and {names[two]}" for one, two in orders_P2.tolist()])

    def _embed_nouns(self, nouns: Sequence[str]) -> Tensor:
        return self.embed_texts([self.prompt.format(noun=noun) for noun in nouns])

    def similarity(self, images: Images, captions: Sequence[str]) -> Tensor:
        """Cosine similarity of each image with its caption, N; the mean is CLIP-T (Hessel et al. 2021, unscaled)."""
        _check_counts(images, captions)
        return (self.embed_images(images) * self.embed_texts(captions)).sum(1)

    @torch.no_grad()
    def embed_images(self, images: Images) -> Tensor:
        """Unit vectors, N x D, fp32 on the CPU."""
        embedded = []
        for first in range(0, len(images), self.batch_size):
            batch = [_checked(image) for image in images[first : first + self.batch_size]]
            pixels_BCHW = self.processor(batch, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
            out = self.clip.get_image_features(pixel_values=pixels_BCHW.to(self.clip.device, self.clip.dtype))
            embedded.append(F.normalize(out.pooler_output.float(), dim=1).cpu())
        return torch.cat(embedded)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors, N x D, fp32 on the CPU; texts are truncated to the length of the text model."""
        embedded = []
        for first in range(0, len(texts), self.batch_size):
            ids_BL = self.tokenizer(
                list(texts[first : first + self.batch_size]),
                padding="max_length",
                max_length=self.clip.config.text_config.max_position_embeddings,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            out = self.clip.get_text_features(input_ids=ids_BL.to(self.clip.device))
            embedded.append(F.normalize(out.pooler_output.float(), dim=1).cpu())
        return torch.cat(embedded)


def load_judge(source: str, classes: Sequence[str] | None = None) -> Judge:
    """Loads a judge from a folder or the hub: a CLIPModel in safetensors, its tokenizer and its image processor.

    Also a VisionTextDualEncoderModel whose text model is a CLIP's.

    source: folder or hub id. `nano` is the judge in this package that measures, `nano_watching` the one by which its
        runs are watched.

    A folder without `preprocessor_config.json` is taken for a nano judge, with pixels in [-1, 1].
    """
    folder = NANO_JUDGES.get(source) or Path(source).expanduser()
    try:
        clip = load_clip(folder if folder.is_dir() else source)
        tokenizer = CLIPTokenizer.from_pretrained(folder if folder.is_dir() else source)
        processor = None
        if not folder.is_dir() or (folder / "preprocessor_config.json").is_file():
            processor = CLIPImageProcessorPil.from_pretrained(folder if folder.is_dir() else source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no judge could be loaded from {source!r} ({error}); give a folder or a hub id with a CLIPModel in "
            "safetensors and its tokenizer"
        ) from error
    return Judge(clip, tokenizer, classes, processor)


def load_clip(source: str | Path) -> Clip:
    """The model of a folder or of the hub, from safetensors. Raises ValueError for one of another kind."""
    clip = AutoModel.from_pretrained(source, use_safetensors=True)
    if not isinstance(clip, Clip) or clip.config.text_config.model_type != "clip_text_model":
        raise ValueError(f"it is a {type(clip).__name__}")
    return with_flat_features(clip)


def watching_judge(source: str) -> str:
    """The judge by which a run is watched and a checkpoint is chosen, if `source` measures the result.

    Whatever is chosen by a judge pleases that judge more than others, so that its figures would be too good. Of nano
    there are two, trained apart.
    """
    return "nano_watching" if source == "nano" else source


def pixels_in_unit_range(image_size: int) -> CLIPImageProcessorPil:
    """An image processor that gives pixels in [-1, 1] at `image_size`."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def with_article(noun: str) -> str:
    """`a cat`, `an owl`."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def _check_counts(images: Images, texts: Sized) -> None:
    if len(images) != len(texts) or len(images) == 0:
        raise UserError(f"{len(images)} images and {len(texts)} texts: the judge needs one text per image")


def _checked(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise UserError(f"images are uint8 of shape (h, w, 3), not {image.dtype} of shape {image.shape}")
    return image
