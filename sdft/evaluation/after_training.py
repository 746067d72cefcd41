"""What a finished run achieved, in figures and one picture: the base beside the tuned model.

Each verdict is an object chosen by config; called with the tuned model and a way back to its base, it gives the
figures of `summary.json`. Knows sampling and measures; does not know how the model was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sdft.data.dataset import Pictures, Source, batches
from sdft.data.images import to_uint8
from sdft.data.sources.toy import ToyWorld
from sdft.data.toy.scenes import SUBJECTS
from sdft.evaluation.clip_judge import Judge, load_judge
from sdft.evaluation.image_grid import save_grid
from sdft.evaluation.style_gain import StyleGainMetric
from sdft.models.load import NANO
from sdft.models.nano.build import tokenizer
from sdft.models.sdxl import SDXL
from sdft.sampling.generate import generate
from sdft.sampling.samplers import Sampler
from sdft.types import Count, Precision

Base = Callable[[], AbstractContextManager]
BEFORE_AFTER = "before_after.png"
MIN_REFERENCES = 4


class StyleEvaluation:
    """Did the model learn the look, and does it still draw what it is asked?

    reference: held-out pictures of the look; the captions of its first `num_images` are the prompts.
    prompts: what `before_after.png` shows.
    sampler, size: how and how large pictures are drawn.
    judge: folder or hub id of the CLIP that measures adherence; `nano` is the shipped one; none measures nothing.
    caption: how a prompt asks for the look; with a word in it, the look without the word is measured too.
    reduced_side: pictures are reduced to this side before they are compared.
    """

    def __init__(
        self,
        reference: Source,
        prompts: Sequence[str],
        sampler: Sampler,
        size: Count,
        num_images: Count = 64,
        judge: str | None = None,
        caption: str = "{caption}",
        reduced_side: Count = 64,
    ):
        self.reference, self.prompts, self.sampler, self.size = reference, list(prompts), sampler, size
        self.num_images, self.caption, self.reduced_side = min(num_images, len(reference.keys)), caption, reduced_side
        self.judge = judge

    def __call__(self, model: SDXL, base: Base, folder: Path, precision: Precision = "fp32") -> dict[str, Any]:
        """Figures of the run; writes `before_after.png` into `folder`."""
        captions = [self.reference[index].caption for index in range(self.num_images)]
        asked = [self.caption.format(caption=caption) for caption in captions]
        draw = partial(self._draw, model, precision)
        with base():
            before = draw(captions, "base")
            shown = [draw(self.prompts)]
        tuned = draw(asked, "tuned")
        shown.append(draw([self.caption.format(caption=prompt) for prompt in self.prompts]))
        save_grid(folder / BEFORE_AFTER, shown, ["base", "tuned"], self.prompts)
        if len(self.reference.keys) < MIN_REFERENCES:
            why = f"not measured: {len(self.reference.keys)} held-out pictures, needs {MIN_REFERENCES}"
            return {"style_gain": None, "style_gain_note": why} | self._adherence(before, tuned, captions)
        reference, reconstructed = self._references(model)
        gauge = StyleGainMetric(before, reference, reconstructed, side=self.reduced_side)
        gain = gauge(tuned)
        figures = {
            "style_gain": gain.style_gain,
            "style_gain_ceiling": gain.ceiling,
            "style_gain_colour": gain.colour.gain,
            "style_gain_patches": gain.patches.gain,
            "distance_base": gain.d_base,
            "distance_tuned": gain.d_tuned,
            "distance_floor": gain.d_floor,
        }
        if self.caption != "{caption}":
            unasked = draw(captions, "tuned, without the word")
            figures["style_gain_without_word"] = gauge(unasked).style_gain
        return figures | self._adherence(before, tuned, captions)

    def _draw(
        self, model: SDXL, precision: Precision, prompts: Sequence[str], progress: str | None = None
    ) -> np.ndarray:
        size_hw = (self.size, self.size)
        return generate(model, prompts, range(len(prompts)), self.sampler, size_hw, precision, progress)

    def _references(self, model: SDXL) -> tuple[np.ndarray, np.ndarray]:
        """The held-out pictures, and the same through the VAE."""
        pictures = Pictures(self.reference, (self.size, self.size), seed=0)
        real, through = [], []
        for batch in batches(pictures, range(len(self.reference.keys)), self.sampler.batch_size):
            batch = batch.to(model.device)
            assert batch.pixels_BCHW is not None
            real.append(to_uint8(batch.pixels_BCHW))
            through.append(to_uint8(model.decode(model.encode_images(batch))))
        return np.concatenate(real), np.concatenate(through)

    def _adherence(self, before: np.ndarray, tuned: np.ndarray, captions: Sequence[str]) -> dict[str, float]:
        if self.judge is None:
            return {}
        scene = getattr(self.reference, "scene", None)
        judge = load_judge(str(NANO / "clip") if self.judge == "nano" else self.judge, SUBJECTS if scene else None)
        if scene:
            subjects = [scene(index).subject for index in range(self.num_images)]
            return {
                "adherence": judge.subject_accuracy(tuned, subjects),
                "adherence_base": judge.subject_accuracy(before, subjects),
            }
        return {
            "adherence": float(judge.similarity(tuned, captions).mean()),
            "adherence_base": float(judge.similarity(before, captions).mean()),
        }


class AutoencoderEvaluation:
    """How well a VAE keeps pictures: PSNR in dB on held-out ones, by the look in their key."""

    def __init__(self, references: dict[str, Source], size: Count):
        self.references, self.size = references, size

    @torch.no_grad()
    def __call__(self, vae: nn.Module, base: Base, folder: Path, precision: Precision = "fp32") -> dict[str, float]:
        """Mean PSNR of each reference; writes originals above reconstructions."""
        figures, rows, labels = {}, [], []
        for name, source in self.references.items():
            pictures = Pictures(source, (self.size, self.size), seed=0)
            psnr, shown = [], []
            for batch in batches(pictures, range(len(source.keys)), 16):
                assert batch.pixels_BCHW is not None
                x = batch.pixels_BCHW.to(vae.device)
                y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
                psnr += (6.0206 - 10 * (y - x).square().mean(dim=(1, 2, 3)).log10()).tolist()
                shown.append((to_uint8(x), to_uint8(y)))
            figures[f"psnr_{name}"] = float(np.mean(psnr))
            rows += [np.concatenate(column)[:10] for column in zip(*shown, strict=True)]
            labels += [name, "through the VAE"]
        save_grid(folder / BEFORE_AFTER, rows, labels)
        return figures


class JudgeEvaluation:
    """How often a CLIP names the subject of held-out pictures."""

    def __init__(self, references: dict[str, ToyWorld], words: Sequence[str]):
        self.references, self.tokenizer = references, tokenizer(words, "<|endoftext|>")

    def __call__(self, clip: nn.Module, base: Base, folder: Path, precision: Precision = "fp32") -> dict[str, float]:
        """Accuracy of each reference, and over all."""
        judge = Judge(clip, self.tokenizer, SUBJECTS)
        figures = {}
        for name, source in self.references.items():
            images = np.stack([source[index].image_HWC for index in range(len(source.keys))])
            subjects = [source.scene(index).subject for index in range(len(source.keys))]
            figures[f"accuracy_{name}"] = judge.subject_accuracy(images, subjects)
        return figures | {"accuracy": float(np.mean(list(figures.values())))}
