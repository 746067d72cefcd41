"""Metrics of single images: sharpness, noise, contrast, colourfulness. No network, nothing to compare with.

None of them has a better direction: a dreamy image is soft on purpose.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.ndimage import convolve

from sdft.evaluation.metrics.protocol import GeneratedImages, MetricInputs
from sdft.evaluation.results import MetricInfo

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue, Rec. 601."""
LAPLACE = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=float)
SECOND_DIFFERENCES = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=float)


def sharpness(image_HWC: np.ndarray) -> float:
    """Standard deviation of the Laplacian of the luma, in levels of 255 (root of the measure of Pech-Pacheco 2000)."""
    return float(_filtered(image_HWC, LAPLACE).std())


def noise(image_HWC: np.ndarray) -> float:
    """Standard deviation of white noise in the luma, in levels of 255 (Immerkaer 1996); texture counts as noise."""
    return float(np.sqrt(np.pi / 2) / 6 * np.abs(_filtered(image_HWC, SECOND_DIFFERENCES)).mean())


def contrast(image_HWC: np.ndarray) -> float:
    """Standard deviation of the luma, in levels of 255."""
    return float((image_HWC @ LUMA).std())


def colourfulness(image_HWC: np.ndarray) -> float:
    """M3 of Hasler and Suesstrunk 2003: 0 is grey, 109 extremely colourful."""
    red, green, blue = (image_HWC[..., i].astype(float) for i in range(3))
    rg, yb = red - green, (red + green) / 2 - blue
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def _filtered(image_HWC: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """The valid part of a convolution of the luma, without the border."""
    return convolve(image_HWC @ LUMA, kernel)[1:-1, 1:-1]


class PixelMetric:
    """One value per image, computed from its pixels.

    of: the function of one uint8 RGB image, H x W x 3.
    """

    needs = ()

    def __init__(self, info: MetricInfo, of: Callable[[np.ndarray], float]):
        self.info, self._of = info, of

    def __call__(self, generated: GeneratedImages, inputs: MetricInputs) -> np.ndarray:
        return np.array([self._of(image) for image in generated.images])


def Sharpness() -> PixelMetric:
    return PixelMetric(MetricInfo("sharpness", "sharpness", None, "Strength of edges and fine detail."), sharpness)


def Noise() -> PixelMetric:
    return PixelMetric(MetricInfo("noise", "noise", None, "Grain, in levels of 255; fine texture counts too."), noise)


def Contrast() -> PixelMetric:
    return PixelMetric(MetricInfo("contrast", "contrast", None, "Spread of lightness, in levels of 255."), contrast)


def Colourfulness() -> PixelMetric:
    meaning = "How vivid the colours are; 0 is grey, above 80 very colourful."
    return PixelMetric(MetricInfo("colourfulness", "colourfulness", None, meaning), colourfulness)
