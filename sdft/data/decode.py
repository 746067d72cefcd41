"""Decoding image files to upright sRGB pixels, or the reason why that is not possible.

Knows file formats and colour, not where the bytes come from.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from sdft.errors import UserError

T = TypeVar("T")
PLUGINS = {"pillow_heif": ((".heic", ".heif"), "pillow-heif"), "pillow_jxl": ((".jxl",), "pillow-jxl-plugin")}
"""Module that teaches Pillow a format -> suffixes of its files, and the package to install."""
IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
"""Of files that are read as pictures here."""
CAMERA_RAW = (".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2")
OTHER_PICTURES = dict.fromkeys(CAMERA_RAW, "save it as JPEG or PNG")
"""Suffixes of pictures that cannot be read here -> what to do."""
for module, (suffixes, package) in PLUGINS.items():
    if importlib.util.find_spec(module):
        plugin = importlib.import_module(module)  # the one for JPEG XL registers itself
        getattr(plugin, "register_heif_opener", lambda: None)()
        IMAGE_SUFFIXES |= {*suffixes}
    else:
        OTHER_PICTURES |= dict.fromkeys(suffixes, f"pip install {package}")

# Pillow warns from 89 megapixels on, which large scans have; from twice that on it refuses, and so does this module.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

LEAST_SIDE = 8
"""Images with a shorter side are refused."""
EXIF_ORIENTATION = 0x0112
SRGB = ImageCms.createProfile("sRGB")


class UnreadableImage(Exception):
    """The bytes are not an image that can be trained on; the message is the reason."""


@dataclass(frozen=True)
class StoredImage:
    """An image file, read when its pixels are needed.

    name: for error messages: the path of the file, or shard and member.
    read: returns the bytes of the file.
    stamp: returns a text that changes whenever the bytes do, without reading them; None if there is none.
    """

    name: str
    read: Callable[[], bytes]
    stamp: Callable[[], str | None] = lambda: None

    def content(self) -> bytes:
        """The bytes of the file. Raises UnreadableImage if they cannot be read."""
        try:
            return self.read()
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from error

    def mask(self) -> np.ndarray:
        """uint8, H x W, of an image that is a mask. Raises UserError with the name if it cannot be decoded."""
        return self._decoded(decode_mask, "a mask")

    def has_alpha(self) -> bool:
        """Whether it has an alpha channel or a transparent colour. Raises UserError with the name if it cannot be
        read."""
        return self._decoded(has_alpha)

    def alpha(self) -> np.ndarray | None:
        """uint8, H x W: the alpha channel; None if it has none. Raises UserError with the name if it cannot be
        decoded."""
        return self._decoded(decode_alpha)

    def pixels(self) -> np.ndarray:
        """uint8, H x W x RGB. Raises UserError with the name if it cannot be decoded."""
        return self._decoded(decode)

    def _decoded(self, look: Callable[[bytes], T], kind: str = "an image") -> T:
        try:
            return look(self.content())
        except UnreadableImage as error:
            raise UserError(f"{self.name} cannot be read as {kind} ({error}); repair or remove it") from error


def decode(content: bytes) -> np.ndarray:
    """Pixels as image viewers show them: upright, in sRGB, transparency on white. uint8, H x W x RGB.

    Raises UnreadableImage.
    """
    return _guarded(content, lambda picture: np.asarray(_rgb(_eight_bits(_upright(picture)))))


def decode_mask(content: bytes) -> np.ndarray:
    """The mask in an image, uint8 H x W: its transparency if it has any, else its grey values.

    Raises UnreadableImage.
    """

    def look(picture: Image.Image) -> np.ndarray:
        picture = _upright(picture)
        if _is_transparent(picture):
            return np.asarray(_alpha(picture))
        return np.asarray(_eight_bits(picture).convert("L"))

    return _guarded(content, look)


def decode_alpha(content: bytes) -> np.ndarray | None:
    """The alpha channel of an image, uint8 H x W, upright; None if it has none. Raises UnreadableImage."""

    def look(picture: Image.Image) -> np.ndarray | None:
        picture = _upright(picture)
        return np.asarray(_alpha(picture)) if _is_transparent(picture) else None

    return _guarded(content, look)


def has_alpha(content: bytes) -> bool:
    """Whether an image has an alpha channel, or a transparent colour, from the header alone. Raises UnreadableImage."""
    return _guarded(content, _is_transparent)


def stored_hw(content: bytes) -> tuple[int, int]:
    """Height and width that `decode` returns, from the header alone. Raises UnreadableImage."""
    return _guarded(content, _upright_hw)


def examine(content: bytes) -> tuple[int, int]:
    """Height and width, after checking that `decode` can read all of it, in less time. Raises UnreadableImage."""

    def look(picture: Image.Image) -> tuple[int, int]:
        hw = _upright_hw(picture)
        if picture.format == "JPEG" and picture.mode in ("RGB", "L") and not picture.info.get("icc_profile"):
            picture.draft(None, (picture.width // 8, picture.height // 8))  # reads every byte, makes few pixels
            picture.load()
        else:
            _rgb(_eight_bits(_upright(picture)))
        return hw

    return _guarded(content, look)


def _guarded(content: bytes, look: Callable):
    """The result of `look` on the opened image; all errors of Pillow become UnreadableImage."""
    if not content:
        raise UnreadableImage("the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as picture:
            frames = getattr(picture, "n_frames", 1)
            # MPO, the JPEG of some phones, has a second view behind the image.
            if frames > 1 and picture.format != "MPO":
                raise UnreadableImage(f"animated or multi-page: {frames} frames; keep one of them")
            if min(picture.size) < LEAST_SIDE:
                raise UnreadableImage(f"only {picture.width} x {picture.height} pixels")
            return look(picture)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage("not a known image format") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage("more than 178 megapixels, as decompression bombs have; reduce it") from error
    except Exception as error:  # Pillow's decoders raise many kinds on malformed files
        raise UnreadableImage(" ".join(str(error).split()) or type(error).__name__) from error


def _upright_hw(picture: Image.Image) -> tuple[int, int]:
    w, h = picture.size
    return (w, h) if picture.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8) else (h, w)


def _upright(picture: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(picture)


def _is_transparent(picture: Image.Image) -> bool:
    return picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info


def _alpha(picture: Image.Image) -> Image.Image:
    return picture.convert("RGBA").getchannel("A")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey; other modes unchanged."""
    if picture.mode == "F":
        raise UnreadableImage("floating-point pixels of unknown range; save it with 8 or 16 bits")
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImage("integer pixels of more than 16 bits; save it with 8 or 16 bits")
    eight = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    eight.info = {"icc_profile": picture.info.get("icc_profile")}
    return eight


def _rgb(picture: Image.Image) -> Image.Image:
    """sRGB of any mode, transparency on white."""
    profile = picture.info.get("icc_profile")
    alpha = None
    if _is_transparent(picture):
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
    if picture.mode not in ("L", "RGB", "CMYK", "LAB"):
        picture = picture.convert("RGB")
    picture = _srgb(picture, profile) if profile else picture.convert("RGB")
    if alpha is None:
        return picture
    return Image.composite(picture, Image.new("RGB", picture.size, "white"), alpha)


def _srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """Converts from an embedded colour profile to sRGB; an image in sRGB is unchanged."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if picture.mode == "RGB" and "srgb" in ImageCms.getProfileDescription(source).lower():
            return picture
        shown = ImageCms.profileToProfile(picture, source, SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        raise UnreadableImage(f"its colour profile does not match: {str(error).strip()}") from error
    assert shown is not None  # None only for in-place conversion
    return shown
