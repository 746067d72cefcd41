"""Random changes of images at each visit: zoom, rotation, and colours. Pure functions of a seed, a key and a visit."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Ge, Le
from PIL import Image, ImageEnhance

from sdft.rng import Draws
from sdft.types import Fraction

Degrees = Annotated[float, Ge(0), Le(45)]
Hue = Annotated[float, Ge(0), Le(0.5)]


class Geometry(NamedTuple):
    """How an image is zoomed and turned before it is cropped. zoom: factor, at least 1. angle: degrees, clockwise."""

    zoom: float = 1.0
    angle: float = 0.0


class Colours(NamedTuple):
    """Factors on brightness, contrast and saturation, and a shift of the hue in turns."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0


class Augmentation:
    """Ranges of the changes, each drawn uniformly.

    zoom: by up to this share, before the crop, whose place is `data.crop`. rotation: by up to these degrees in both
    directions; the crop is taken from within the image, so nothing is filled in. brightness, contrast, saturation:
    factors within 1 plus or minus this. hue: shift in turns, in both directions.
    """

    def __init__(
        self,
        zoom: Fraction = 0.0,
        rotation: Degrees = 0.0,
        brightness: Fraction = 0.0,
        contrast: Fraction = 0.0,
        saturation: Fraction = 0.0,
        hue: Hue = 0.0,
    ):
        self.zoom, self.rotation = zoom, rotation
        self.ranges = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}

    @property
    def changes(self) -> bool:
        """Whether any image is changed."""
        return bool(self.zoom or self.rotation or any(self.ranges.values()))

    def geometry(self, draws: Draws) -> Geometry:
        """The geometry of the visit of `draws`."""
        zoom = 1 + self.zoom * float(draws.uniform("zoom")) if self.zoom else 1.0
        angle = self.rotation * (2 * float(draws.uniform("rotation")) - 1) if self.rotation else 0.0
        return Geometry(zoom, angle)

    def colours(self, draws: Draws) -> Colours:
        """The colours of the visit of `draws`."""
        shifts = {name: most * (2 * float(draws.uniform(name)) - 1) for name, most in self.ranges.items() if most}
        hue = shifts.pop("hue", 0.0)
        return Colours(**{name: 1 + shift for name, shift in shifts.items()}, hue=hue)


def recoloured(image_HWC: np.ndarray, colours: Colours) -> np.ndarray:
    """The image with other colours, in the order of the fields; uint8 RGB."""
    if colours == Colours():
        return image_HWC
    picture = Image.fromarray(image_HWC)
    for enhance, factor in zip(
        (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), colours[:3], strict=True
    ):
        if factor != 1:
            picture = enhance(picture).enhance(factor)
    if colours.hue:
        hue, saturation, value = picture.convert("HSV").split()
        shift = round(colours.hue * 256)
        hue = hue.point([(level + shift) % 256 for level in range(256)])
        picture = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return np.asarray(picture)
