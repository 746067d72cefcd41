"""The contract of segmenters, one that needs no model, and those of transformers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import binary_fill_holes, label

from sdft.errors import UserError
from sdft.types import Fraction, NonNegative


@runtime_checkable  # so that the config check tells a segmenter from a number
class Segmenter(Protocol):
    """Finds the subject of an image."""

    def __call__(self, image_HWC: np.ndarray) -> np.ndarray:
        """The mask, uint8 H x W: 255 at the subject, 0 elsewhere; `image_HWC` is uint8 RGB."""


class PlainBackground:
    """Everything but the background, which is what is connected to the border and of nearly its colour.

    For products and drawings before a plain background. tolerance: largest difference to the median colour of the
    border, in levels of 255, of each channel.
    """

    def __init__(self, tolerance: NonNegative = 24.0):
        self.tolerance = tolerance

    def __call__(self, image_HWC: np.ndarray) -> np.ndarray:
        border = np.concatenate([image_HWC[0], image_HWC[-1], image_HWC[:, 0], image_HWC[:, -1]])
        distance_HW = np.abs(image_HWC.astype(np.int16) - np.median(border, axis=0)).max(-1)
        regions_HW, _ = label(distance_HW <= self.tolerance)
        edges = (regions_HW[0], regions_HW[-1], regions_HW[:, 0], regions_HW[:, -1])
        background_HW = np.isin(regions_HW, np.setdiff1d(np.concatenate(edges), [0]))
        return binary_fill_holes(~background_HW).astype(np.uint8) * 255


class TextSegmenter:
    """What a text names, by a CLIPSeg model of transformers.

    model: folder or hub id. text: what to find, such as `a person`. threshold: probability from which a pixel belongs
    to it; None for a soft mask of the probabilities. Raises UserError if the model cannot be loaded.
    """

    def __init__(self, text: str, model: str = "CIDAS/clipseg-rd64-refined", threshold: Fraction | None = 0.4):
        from transformers import AutoProcessor, CLIPSegForImageSegmentation

        self.text, self.threshold, model = text, threshold, os.path.expanduser(model)
        try:
            self.processor: Any = AutoProcessor.from_pretrained(model)
            self.model: Any = CLIPSegForImageSegmentation.from_pretrained(model, use_safetensors=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise not_loaded(model, "CLIPSeg model", error) from error
        self.model = self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.no_grad()
    def __call__(self, image_HWC: np.ndarray) -> np.ndarray:
        inputs = self.processor(images=[Image.fromarray(image_HWC)], text=[self.text], return_tensors="pt")
        logits = self.model(**inputs.to(self.model.device)).logits.float()
        return as_mask(logits.reshape(1, 1, *logits.shape[-2:]).sigmoid(), image_HWC, self.threshold)


class ClassSegmenter:
    """The pixels of some classes, by a semantic segmentation model of transformers (SegFormer, BEiT, DPT and others).

    model: folder or hub id. classes: names as the model has them; all but `background` if empty.
    """

    def __init__(self, model: str = "nvidia/segformer-b0-finetuned-ade-512-512", classes: Sequence[str] = ()):
        from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

        model = os.path.expanduser(model)
        try:
            self.processor: Any = AutoImageProcessor.from_pretrained(model)
            self.model: Any = AutoModelForSemanticSegmentation.from_pretrained(model, use_safetensors=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise not_loaded(model, "semantic segmentation model", error) from error
        self.model = self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        names = {name.lower(): number for number, name in self.model.config.id2label.items()}
        if unknown := [name for name in classes if name.lower() not in names]:
            raise UserError(f"segmenter.classes: {unknown[0]!r} is none of the model's: {', '.join(sorted(names))}")
        self.chosen = [names[name.lower()] for name in classes] or [n for k, n in names.items() if k != "background"]

    @torch.no_grad()
    def __call__(self, image_HWC: np.ndarray) -> np.ndarray:
        inputs = self.processor(images=[Image.fromarray(image_HWC)], return_tensors="pt")
        shares_BKHW = self.model(**inputs.to(self.model.device)).logits.float().softmax(1)
        found_B1HW = shares_BKHW[:, self.chosen].sum(1, keepdim=True)
        return as_mask(found_B1HW, image_HWC, 0.5)


def as_mask(share_B1HW: torch.Tensor, image_HWC: np.ndarray, threshold: float | None) -> np.ndarray:
    """A map of probabilities at the size of the image, as uint8."""
    h, w = image_HWC.shape[:2]
    share_HW = F.interpolate(share_B1HW, (h, w), mode="bilinear", align_corners=False)[0, 0]
    if threshold is not None:
        share_HW = (share_HW >= threshold).float()
    return (share_HW * 255).round().byte().cpu().numpy()


def not_loaded(model: str, kind: str, error: Exception) -> UserError:
    """The error for a model that cannot be loaded."""
    reason = " ".join(str(error).split())[:500]
    return UserError(
        f"segmenter.model={model}: no {kind} can be loaded ({reason}); give a folder or hub id in safetensors"
    )
