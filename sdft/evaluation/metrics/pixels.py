"""What a picture's own pixels say: sharpness, noise, contrast, colourfulness. No weights, no partner.

None of them is better in one direction: a dreamy picture is soft on purpose.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.ndimage import convolve

from sdft.evaluation.metrics.measure import Drawn, Lab
from sdft.evaluation.results import Metric

LUMA = np.array([0.299, 0.587, 0.114])
"""Of Rec. 601."""
LAPLACE = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], dtype=float)
SECOND_DIFFERENCES = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=float)


def sharpness(image_HWC: np.ndarray) -> float:
    """Standard deviation of the Laplacian of the luma, in bytes (the focus measure of Pech-Pacheco 2000, its root)."""
    return float(_filtered(image_HWC, LAPLACE).std())


def noise(image_HWC: np.ndarray) -> float:
    """Standard deviation of white noise in the luma, in bytes (Immerkaer 1996); strong texture counts as noise."""
    return float(np.sqrt(np.pi / 2) / 6 * np.abs(_filtered(image_HWC, SECOND_DIFFERENCES)).mean())


def contrast(image_HWC: np.ndarray) -> float:
    """Standard deviation of the luma, in bytes."""
    return float((image_HWC @ LUMA).std())


def colourfulness(image_HWC: np.ndarray) -> float:
    """M3 of Hasler and Suesstrunk 2003: 0 is grey, 109 extremely colourful."""
    red, green, blue = (image_HWC[..., i].astype(float) for i in range(3))
    rg, yb = red - green, (red + green) / 2 - blue
    return float(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))


def _filtered(image_HWC: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Without the border, where the kernel would look outside."""
    return convolve(image_HWC @ LUMA, kernel)[1:-1, 1:-1]


class PixelMetric:
    """One figure of each picture's pixels."""

    needs = ()

    def __init__(self, metric: Metric, of: Callable[[np.ndarray], float]):
        self.metric, self._of = metric, of

    def __call__(self, drawn: Drawn, lab: Lab) -> np.ndarray:
        return np.array([self._of(image) for image in drawn.images])


def Sharpness() -> PixelMetric:
    return PixelMetric(Metric("sharpness", "sharpness", None, "How strong edges and fine detail are."), sharpness)


def Noise() -> PixelMetric:
    return PixelMetric(Metric("noise", "noise", None, "Grain, in levels of 255; fine texture counts too."), noise)


def Contrast() -> PixelMetric:
    return PixelMetric(Metric("contrast", "contrast", None, "How far light and dark are apart, of 255."), contrast)


def Colourfulness() -> PixelMetric:
    told = "How vivid the colours are; 0 is grey, above 80 very colourful."
    return PixelMetric(Metric("colourfulness", "colourfulness", None, told), colourfulness)
