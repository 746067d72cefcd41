"""Resizing, cropping and flipping images, and the size and crop conditioning of SDXL that follows from it.

Knows geometry only, not where images come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Crop = Literal["center", "random"]


@dataclass(frozen=True)
class CropPlan:
    """How an image is resized, cropped and flipped. Sizes are (h, w); the crop is measured in the resized image."""

    original_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    top: int
    left: int
    target_hw: tuple[int, int]
    flip: bool

    @property
    def time_ids_6(self) -> tuple[int, ...]:
        """SDXL's size and crop conditioning: original h, w, crop top, left, target h, w. A flip mirrors the crop."""
        left = self.resized_hw[1] - self.left - self.target_hw[1] if self.flip else self.left
        return (*self.original_hw, self.top, left, *self.target_hw)


def plan_crop(
    original_hw: tuple[int, int], target_hw: tuple[int, int], at: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> CropPlan:
    """The smallest resize that covers the target, then a crop at the fraction `at` of the surplus (0.5: centre)."""
    scale = max(target / original for target, original in zip(target_hw, original_hw, strict=True))
    h, w = (max(round(side * scale), target) for side, target in zip(original_hw, target_hw, strict=True))
    top, left = (
        min(int((side - target) * fraction + 0.5), side - target)
        for side, target, fraction in zip((h, w), target_hw, at, strict=True)
    )
    return CropPlan(original_hw, (h, w), top, left, target_hw, flip)


def crop_image(image_HWC: np.ndarray, plan: CropPlan) -> Tensor:
    """Pixels of the crop, CHW, fp32 in [-1, 1]; `image_HWC` is uint8."""
    if image_HWC.shape[:2] != plan.resized_hw:
        h, w = plan.resized_hw
        image_HWC = np.asarray(Image.fromarray(image_HWC).resize((w, h), Image.Resampling.LANCZOS))
    h, w = plan.target_hw
    window = image_HWC[plan.top : plan.top + h, plan.left : plan.left + w]
    if plan.flip:
        window = window[:, ::-1]
    return torch.from_numpy(np.array(window, order="C")).permute(2, 0, 1).float() / 127.5 - 1


def to_uint8(pixels_BCHW: Tensor) -> np.ndarray:
    """B x H x W x C uint8 of pixels in [-1, 1]."""
    return ((pixels_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
