"""Resizing, cropping and flipping images, and the size and crop conditioning of SDXL that follows from it.

Knows geometry only, not where images come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdft.data.augmentation import Colours, Geometry, recoloured

Crop = Literal["center", "random"]


@dataclass(frozen=True)
class CropPlan:
    """How an image is resized, turned, cropped and flipped. Sizes are (h, w); the crop is of the resized image.

    angle: degrees by which the crop is turned about its centre, counter-clockwise; the image appears turned clockwise.
    """

    original_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    top: int
    left: int
    target_hw: tuple[int, int]
    flip: bool
    angle: float = 0.0

    @property
    def time_ids_6(self) -> tuple[int, ...]:
        """SDXL's size and crop conditioning: original h, w, crop top, left, target h, w. A flip mirrors the crop."""
        left = self.resized_hw[1] - self.left - self.target_hw[1] if self.flip else self.left
        return (*self.original_hw, self.top, left, *self.target_hw)


def plan_crop(
    original_hw: tuple[int, int],
    target_hw: tuple[int, int],
    at: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
    geometry: Geometry = Geometry(),
) -> CropPlan:
    """The smallest resize that covers the target, then a crop at the fraction `at` of the surplus (0.5: centre).

    geometry: zooms beyond that resize, and turns the crop, around which the image has to be the larger.
    """
    box_hw = turned_box(target_hw, geometry.angle)
    scale = geometry.zoom * max(box / original for box, original in zip(box_hw, original_hw, strict=True))
    h, w = (max(round(side * scale), box) for side, box in zip(original_hw, box_hw, strict=True))
    top, left = (
        min(int((side - box) * fraction + 0.5), side - box) + (box - target) // 2
        for side, box, target, fraction in zip((h, w), box_hw, target_hw, at, strict=True)
    )
    return CropPlan(original_hw, (h, w), top, left, target_hw, flip, geometry.angle)


def turned_box(hw: tuple[int, int], angle: float) -> tuple[int, int]:
    """The size of the upright box around a turned rectangle."""
    if not angle:
        return hw
    sine, cosine = abs(math.sin(math.radians(angle))), abs(math.cos(math.radians(angle)))
    h, w = hw
    return math.ceil(h * cosine + w * sine - 1e-9), math.ceil(w * cosine + h * sine - 1e-9)


def crop_image(image_HWC: np.ndarray, plan: CropPlan, colours: Colours = Colours()) -> Tensor:
    """Pixels of the crop, CHW, fp32 in [-1, 1]; `image_HWC` is uint8."""
    window = window_of(image_HWC, plan, Image.Resampling.LANCZOS, Image.Resampling.BICUBIC)
    window = recoloured(window, colours)
    return torch.from_numpy(np.array(window, order="C")).permute(2, 0, 1).float() / 127.5 - 1


def crop_mask(mask_HW: np.ndarray, plan: CropPlan) -> Tensor:
    """The crop of a mask, 1 x H x W, fp32 in [0, 1]; `mask_HW` is uint8."""
    window = window_of(mask_HW, plan, Image.Resampling.BILINEAR, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(window, order="C"))[None].float() / 255


def window_of(image: np.ndarray, plan: CropPlan, resize: Image.Resampling, turn: Image.Resampling) -> np.ndarray:
    """The resized, turned, cropped and flipped image, uint8."""
    h, w = plan.resized_hw
    if image.shape[:2] != (h, w):
        image = np.asarray(Image.fromarray(image).resize((w, h), resize))
    h, w = plan.target_hw
    if plan.angle:
        sine, cosine = math.sin(math.radians(plan.angle)), math.cos(math.radians(plan.angle))
        x, y = plan.left + w / 2, plan.top + h / 2
        across = (cosine, sine, x - cosine * w / 2 - sine * h / 2)
        down = (-sine, cosine, y + sine * w / 2 - cosine * h / 2)
        turned = Image.fromarray(image).transform((w, h), Image.Transform.AFFINE, (*across, *down), turn)
        window = np.asarray(turned)
    else:
        window = image[plan.top : plan.top + h, plan.left : plan.left + w]
    return window[:, ::-1] if plan.flip else window


def to_uint8(pixels_BCHW: Tensor) -> np.ndarray:
    """B x H x W x C uint8 of pixels in [-1, 1]."""
    return ((pixels_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
