"""From a picture to pixels and the micro-conditioning that tells SDXL how it was cut.

Knows geometry: resize so that the target is covered, crop, flip. Does not know where pictures come from.
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
class Cut:
    """How a picture becomes a training image; sizes are (h, w), the crop is measured in the resized picture."""

    original_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    top: int
    left: int
    target_hw: tuple[int, int]
    flip: bool

    @property
    def time_ids_6(self) -> tuple[int, ...]:
        """SDXL's size and crop conditioning. A flip mirrors the crop: the left edge becomes the right one."""
        left = self.resized_hw[1] - self.left - self.target_hw[1] if self.flip else self.left
        return (*self.original_hw, self.top, left, *self.target_hw)


def plan_cut(
    original_hw: tuple[int, int], target_hw: tuple[int, int], at: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Cut:
    """Cover the target with the smallest resize, then crop at the fraction `at` (0.5 is the centre) of the slack."""
    scale = max(target / original for target, original in zip(target_hw, original_hw, strict=True))
    h, w = (max(round(side * scale), target) for side, target in zip(original_hw, target_hw, strict=True))
    top, left = (
        min(int((side - target) * fraction + 0.5), side - target)
        for side, target, fraction in zip((h, w), target_hw, at, strict=True)
    )
    return Cut(original_hw, (h, w), top, left, target_hw, flip)


def cut_image(image_HWC: np.ndarray, cut: Cut) -> Tensor:
    """Pixels of the cut, CHW, fp32 in [-1, 1]."""
    if image_HWC.shape[:2] != cut.resized_hw:
        h, w = cut.resized_hw
        image_HWC = np.asarray(Image.fromarray(image_HWC).resize((w, h), Image.Resampling.LANCZOS))
    h, w = cut.target_hw
    window = image_HWC[cut.top : cut.top + h, cut.left : cut.left + w]
    if cut.flip:
        window = window[:, ::-1]
    return torch.from_numpy(np.array(window, order="C")).permute(2, 0, 1).float() / 127.5 - 1


def to_uint8(pixels_BCHW: Tensor) -> np.ndarray:
    """B x H x W x C bytes of pixels in [-1, 1]."""
    return ((pixels_BCHW.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
