"""Masks of images: from files beside them, or from their alpha channels.

Knows where the mask of a sample is, not how it is cropped.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from sdft.data.decode import UnreadableImage, decode_mask
from sdft.data.error_messages import complain, join_problems
from sdft.data.scan import Scan
from sdft.data.source import Source, stored_image, stored_mask
from sdft.data.threads import in_threads
from sdft.errors import UserError

Masks = bool | Literal["alpha"]
"""Whether the loss is weighted by masks: true for those in files (cat.mask.png), `alpha` for alpha channels."""


def mask_of(source: Source, index: int, masks: Masks) -> np.ndarray | None:
    """The mask of a sample, uint8, H x W, 255 where the loss counts; None for one without, which counts whole."""
    if masks == "alpha":
        image = stored_image(source, index)
        return image.alpha() if image is not None else None
    mask = stored_mask(source, index) if masks else None
    return mask.mask() if mask is not None else None


def check_masks(source: Source, found: Scan, masks: Masks) -> int:
    """The number of masks of a source. Raises UserError if there are none, and for masks in files naming those that
    cannot be read or do not fit their images."""
    return num_transparent(source) if masks == "alpha" else num_in_files(source, found)


def num_in_files(source: Source, found: Scan) -> int:
    """The number of masks in files of their own; see `check_masks`."""
    wrong, num = [], 0

    def look(index: int) -> str | bool:
        mask = stored_mask(source, index)
        if mask is None:
            return False
        try:
            h, w = decode_mask(mask.content()).shape
        except UnreadableImage as error:
            return f"{mask.name} ({error})"
        original = found.hw_N2[index].tolist()
        fits = [h, w] == original
        return True if fits else f"{mask.name} ({w} x {h}, and its image {original[1]} x {original[0]})"

    for told in in_threads(look, range(len(source.keys))):
        num += bool(told)
        if isinstance(told, str):
            wrong.append(told)
    if wrong:
        complain(
            UserError(f"data.masks: {join_problems(wrong)}; a mask has the size of its image, white where it counts")
        )
    if not num:
        complain(UserError("data.masks=true: no image has a mask; cat.mask.png is that of cat.jpg"))
    return num


def num_transparent(source: Source) -> int:
    """The number of images with an alpha channel; decodes them until one is found that is not opaque."""

    def look(index: int) -> bool:
        image = stored_image(source, index)
        return image is not None and image.has_alpha()

    indices = range(len(source.keys))
    channels = [index for index, told in zip(indices, in_threads(look, indices), strict=True) if told]
    if not channels:
        complain(
            UserError(
                "data.masks=alpha: no image has an alpha channel; save them as PNG or WebP with transparency, or set "
                "data.masks=true for masks in files (cat.mask.png)"
            )
        )
    elif not any((mask := mask_of(source, index, "alpha")) is not None and mask.min() < 255 for index in channels):
        complain(
            UserError(
                f"data.masks=alpha: the alpha channels of all {len(channels)} images are opaque everywhere; make "
                "transparent what the loss should leave out, or set data.masks=false"
            )
        )
    return len(channels)
