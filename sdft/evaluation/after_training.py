"""Evaluation at the end of a training run: metrics for `summary.json`, and `before_after.png`.

The config group `verdict` chooses one of these classes. It is called with the tuned model, and with a context manager
in which the model is the base model again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sdft.data.dataset import ImageDataset, Source, batches
from sdft.data.images import to_uint8
from sdft.data.sources.toy import ToyWorld
from sdft.data.toy.lexicon import SUBJECTS
from sdft.evaluation.clip_judge import Judge, load_judge
from sdft.evaluation.image_grid import save_grid
from sdft.evaluation.style_gain import StyleGainMetric
from sdft.formats.run_folder import BEFORE_AFTER
from sdft.models.nano.build import tokenizer
from sdft.protocols import DiffusionModel
from sdft.sampling.generate import generate
from sdft.sampling.samplers import Sampler
from sdft.types import Count, Precision, Side

Base = Callable[[], AbstractContextManager]
"""Context manager in which the model is the base model."""
SAMPLES = "samples"
MIN_REFERENCES = 4


class ImageEvaluation:
    """What the evaluations of models that draw images share.

    prompts: of `before_after.png`. sampler, size: the sampler, and the side of the images in pixels.
    judge: folder or hub id of a CLIP model; `nano` is the one in this package; None measures nothing that needs one.
    """

    def __init__(self, prompts: Sequence[str], sampler: Sampler, size: Side, judge: str | None):
        self.prompts, self.sampler, self.size, self.judge = list(prompts), sampler, size, judge

    def unmeasured(self) -> dict[str, str]:
        """Metrics that will be null in `summary.json` -> why; known before training."""
        raise NotImplementedError

    def missing(self) -> dict[str, Any]:
        """The entries of `summary.json` for what is not measured: null, and a note that says why."""
        gaps = self.unmeasured()
        return dict.fromkeys(gaps) | {f"{name}_note": f"not measured: {why}" for name, why in gaps.items()}

    def show(self, folder: Path, before: np.ndarray, after: np.ndarray, prompts: Sequence[str] = ()) -> None:
        """Write `before_after.png`, and the tuned model's images one by one to `samples/`, with what they show.

        before, after: images of the base and of the tuned model. prompts: of the tuned model, if others than its own.
        """
        save_grid(folder / BEFORE_AFTER, [before, after], ["base", "tuned"], self.prompts)
        sampler = {name: value for name, value in self.sampler.settings.items() if name != "batch_size"}
        entries = [
            {
                "file": f"{number:02d}.png",
                "prompt": prompt,
                "negative": sampler["negative"],
                "seed": number,
                "size": [self.size, self.size],
                "sampler": {name: value for name, value in sampler.items() if name != "negative"},
            }
            for number, prompt in enumerate(prompts or self.prompts)
        ]
        (folder / SAMPLES).mkdir(exist_ok=True)
        for entry, image in zip(entries, after, strict=True):
            Image.fromarray(image).save(folder / SAMPLES / str(entry["file"]))
        text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
        (folder / SAMPLES / "prompts.json").write_text(text, encoding="utf-8")

    def sample(
        self, model: DiffusionModel, precision: Precision, prompts: Sequence[str], progress: str | None = None
    ) -> np.ndarray:
        """Images of the prompts, the i-th one from the noise of seed i."""
        size_hw = (self.size, self.size)
        return generate(model, prompts, range(len(prompts)), self.sampler, size_hw, precision, progress)


class StyleEvaluation(ImageEvaluation):
    """Style gain and prompt adherence of the tuned model, compared with the base model.

    reference: held-out images of the style; the captions of its first `num_images` are the prompts.
    prompts: prompts of `before_after.png`.
    sampler, size: the sampler, and the side of the images in pixels.
    judge: folder or hub id of the CLIP model that measures adherence; `nano` is the one in this package; by default
        adherence is not measured.
    caption: template of the tuned model's prompts, with `{caption}`. If it adds a word, the style gain without the
        word is measured too.
    reduced_side: images are reduced to this side in pixels before their style is measured; a quarter of `size`, but at
        least 64, if None.
    """

    def __init__(
        self,
        reference: Source,
        prompts: Sequence[str],
        sampler: Sampler,
        size: Side,
        num_images: Count = 64,
        judge: str | None = None,
        caption: str = "{caption}",
        reduced_side: Count | None = None,
    ):
        super().__init__(prompts, sampler, size, judge)
        self.reference = reference
        self.num_images, self.caption = min(num_images, len(reference.keys)), caption
        self.reduced_side = reduced_side or max(64, size // 4)

    def __call__(
        self, model: DiffusionModel, base: Base, folder: Path, precision: Precision = "fp32"
    ) -> dict[str, Any]:
        """The metrics of the run; writes `before_after.png` into `folder`."""
        captions = [self.reference[index].caption for index in range(self.num_images)]
        tuned_prompts = [self.caption.format(caption=caption) for caption in captions]
        sample = partial(self.sample, model, precision)
        with base():
            before = sample(captions, "base")
            shown = sample(self.prompts)
        tuned = sample(tuned_prompts, "tuned")
        with_word = [self.caption.format(caption=prompt) for prompt in self.prompts]
        self.show(folder, shown, sample(with_word), with_word)
        gaps = self.unmeasured()
        missing = self.missing()
        if "style_gain" in gaps:
            return missing | self._adherence(before, tuned, captions)
        reference, reconstructed = self._references(model)
        measure = StyleGainMetric(before, reference, reconstructed, side=self.reduced_side)
        gain = measure(tuned)
        values = {
            "style_gain": gain.style_gain,
            "style_gain_ceiling": gain.ceiling,
            "style_gain_colour": gain.colour.gain,
            "style_gain_patches": gain.patches.gain,
            "distance_base": gain.d_base,
            "distance_tuned": gain.d_tuned,
            "distance_floor": gain.d_floor,
        }
        if self.caption != "{caption}":
            without_word = sample(captions, "tuned, without the word")
            values["style_gain_without_word"] = measure(without_word).style_gain
        return values | missing | self._adherence(before, tuned, captions)

    def unmeasured(self) -> dict[str, str]:
        found, num = {}, len(self.reference.keys)
        if num < MIN_REFERENCES:
            remedy = "hold out more with data.held_out=, or rank by metric=val/eps_mse"
            found["style_gain"] = f"{num} held-out images, needs {MIN_REFERENCES}; {remedy}"
        if self.judge is None:
            found["adherence"] = "verdict.judge is null; name a CLIP with verdict.judge="
        return found

    def _references(self, model: DiffusionModel) -> tuple[np.ndarray, np.ndarray]:
        """The held-out images, and their reconstructions by the VAE."""
        pictures = ImageDataset(self.reference, (self.size, self.size), seed=0)
        real, reconstructed = [], []
        for batch in batches(pictures, range(len(self.reference.keys)), self.sampler.batch_size):
            batch = batch.to(model.device)
            assert batch.pixels_BCHW is not None
            real.append(to_uint8(batch.pixels_BCHW))
            reconstructed.append(to_uint8(model.decode(model.encode_images(batch))))
        return np.concatenate(real), np.concatenate(reconstructed)

    def _adherence(self, before: np.ndarray, tuned: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
        if self.judge is None:
            return {}
        judge = judge_of(self.judge, self.reference)
        return adherence(judge, self.reference, range(self.num_images), captions, before, tuned)


def judge_of(judge: str, reference: Source | None) -> Judge:
    """The judge of images of a source."""
    return load_judge(judge, SUBJECTS if isinstance(reference, ToyWorld) else None)


def adherence(
    judge: Judge,
    reference: Source | None,
    places: Sequence[int],
    captions: Sequence[str],
    before: np.ndarray,
    tuned: np.ndarray,
) -> dict[str, float]:
    """How well images fit their captions, which are those of the samples of `reference` at `places`.

    Toy images have known subjects: the accuracy of naming them is more informative than a similarity.
    """
    if isinstance(reference, ToyWorld):
        subjects = [reference.scene(index).subjects for index in places]
        after, first = (judge.named_hits(images, subjects).float().mean().item() for images in (tuned, before))
    else:
        after, first = (float(judge.similarity(images, captions).mean()) for images in (tuned, before))
    return {"adherence": after, "adherence_base": first}


class AutoencoderEvaluation:
    """Reconstruction quality of a trained VAE on held-out images, for each reference: PSNR in dB, and the error of
    patches."""

    def __init__(self, references: dict[str, Source], size: Count):
        self.references, self.size = references, size

    @torch.no_grad()
    def __call__(self, vae: nn.Module, base: Base, folder: Path, precision: Precision = "fp32") -> dict[str, float]:
        """Mean PSNR and mean error of patches of each reference; writes `before_after.png` with the originals above
        their reconstructions.

        The error of patches is 1 - SSIM (Wang et al. 2004; Gaussian windows of 11 pixels): 0 for the same structure,
        about 1 for another. It sees blur and lost detail where the mean of squares sees brightness.
        """
        from torchmetrics.functional.image import structural_similarity_index_measure as ssim

        values: dict[str, float] = {}
        rows, labels = [], []
        for name, source in self.references.items():
            pictures = ImageDataset(source, (self.size, self.size), seed=0)
            psnr, patches, shown = [], [], []
            for batch in batches(pictures, range(len(source.keys)), 16):
                assert batch.pixels_BCHW is not None
                x = batch.pixels_BCHW.to(vae.device)
                y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
                psnr += (6.0206 - 10 * (y - x).square().mean(dim=(1, 2, 3)).log10()).tolist()
                alike_B = ssim(y / 2 + 0.5, x / 2 + 0.5, reduction="none", data_range=1.0)
                assert isinstance(alike_B, Tensor)  # a tuple only if more is asked for
                patches += (1 - alike_B).tolist()
                shown.append((to_uint8(x), to_uint8(y)))
            values |= {f"psnr_{name}": float(np.mean(psnr)), f"patch_error_{name}": float(np.mean(patches))}
            rows += [np.concatenate(column)[:5] for column in zip(*shown, strict=True)]
            labels += [name, "through the VAE"]
        save_grid(folder / BEFORE_AFTER, rows, labels)
        return values


class JudgeEvaluation:
    """Zero-shot accuracy of a trained CLIP judge on the subjects of held-out toy images."""

    def __init__(self, references: dict[str, ToyWorld], words: Sequence[str], classes: Sequence[str] = SUBJECTS):
        self.references, self.tokenizer = references, tokenizer(words, "<|endoftext|>")
        self.classes = tuple(classes)

    def __call__(self, clip: nn.Module, base: Base, folder: Path, precision: Precision = "fp32") -> dict[str, float]:
        """Accuracy on each reference, and their mean; how well probabilities are calibrated; and, of scenes with two
        subjects, the share in which both are named."""
        judge = Judge(clip, self.tokenizer, self.classes)
        values, sure, right = {}, [], []
        paired: list[np.ndarray] = []
        pairs: list[tuple[str, str]] = []
        for name, source in self.references.items():
            scenes = [source.scene(index) for index in range(len(source.keys))]
            images = np.stack([source[index].image_HWC for index in range(len(source.keys))])
            pair_N = np.array([scene.other is not None for scene in scenes])
            single = [scene for scene in scenes if scene.other is None]
            logits_NK = clip.logit_scale.exp().item() * judge.class_similarities(images[~pair_N])
            hits_N = logits_NK.argmax(1) == judge.numbers_of([scene.subject for scene in single])
            values[f"accuracy_{name}"] = hits_N.float().mean().item()
            sure.append(logits_NK.softmax(1).amax(1))
            right.append(hits_N)
            paired += list(images[pair_N])
            pairs += [(scene.subject, scene.other.subject) for scene in scenes if scene.other is not None]
        found = {"accuracy": float(np.mean(list(values.values()))), "calibration": calibration_error(sure, right)}
        return values | found | ({"both_named": judge.both_hits(paired, pairs).float().mean().item()} if pairs else {})


def calibration_error(sure: Sequence[Tensor], right: Sequence[Tensor], num_bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017): the mean distance of probability and accuracy over ten bins of
    probability, weighted by their images.

    sure: the probabilities of the chosen classes, in any number of tensors. right: whether they are the right ones.
    """
    sure_N, right_N = torch.cat(list(sure)), torch.cat(list(right)).float()
    bins_N = (sure_N * num_bins).long().clamp(max=num_bins - 1)
    gaps = [(sure_N[bins_N == k].sum() - right_N[bins_N == k].sum()).abs() for k in range(num_bins)]
    return float(torch.stack(gaps).sum() / len(sure_N))
