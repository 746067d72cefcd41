"""Every kind of picture file, decoded right or refused with a reason."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from sdft.data.decode import UnreadableImage, decode, examine, stored_hw

HW = (20, 30)


def stored(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def plain(colour, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, HW[::-1], colour)


def colours(content: bytes) -> list[list[int]]:
    """The different pixels of a picture."""
    pixels = decode(content)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (*HW, 3))
    assert examine(content) == stored_hw(content) == HW
    return np.unique(pixels.reshape(-1, 3), axis=0).tolist()


def half_clear(mode: str = "RGBA") -> Image.Image:
    """Red whose opacity is 51 of 255: a fifth."""
    return plain((255, 0, 0, 51)).convert(mode) if mode != "RGBA" else plain((255, 0, 0, 51), "RGBA")


def png(bits: int, colour: int, rows: bytes, hw: tuple[int, int] = HW) -> bytes:
    """A PNG file written by hand: Pillow reads 16 bits of colour and does not write them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", hw[1], hw[0], bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


FORMATS = {
    "rgb png": (stored(plain((10, 20, 30))), [[10, 20, 30]]),
    "webp": (stored(plain((10, 20, 30)), "WEBP", lossless=True), [[10, 20, 30]]),
    "bmp": (stored(plain((10, 20, 30)), "BMP"), [[10, 20, 30]]),
    "tiff": (stored(plain((10, 20, 30)), "TIFF"), [[10, 20, 30]]),
    "grey": (stored(plain(77, "L")), [[77] * 3]),
    "bilevel": (stored(plain(1, "1")), [[255] * 3]),
    "palette": (stored(plain((255, 0, 0)).quantize(4)), [[255, 0, 0]]),
    "still gif": (stored(plain((255, 0, 0)).quantize(4), "GIF"), [[255, 0, 0]]),
    # a fifth of red over white: 255, and 204 = 0.8 * 255
    "alpha": (stored(half_clear()), [[255, 204, 204]]),
    "grey and alpha": (stored(plain((0, 51), "LA")), [[204] * 3]),
    "clear palette": (stored(plain((255, 0, 0)).quantize(4), transparency=0), [[255] * 3]),
    "clear colour": (stored(plain((9, 9, 9)), transparency=(9, 9, 9)), [[255] * 3]),
    # 0x4D4D is 77 of 255: 77 * 257 = 19789
    "grey16 png": (stored(Image.fromarray(np.full(HW, 19789, np.uint16))), [[77] * 3]),
    "grey16 tiff": (stored(Image.fromarray(np.full(HW, 19789, np.uint16)), "TIFF"), [[77] * 3]),
    "int32 tiff": (stored(Image.fromarray(np.full(HW, 65535, np.int32)), "TIFF"), [[255] * 3]),
    "rgb16 png": (png(16, 2, (b"\0" + struct.pack(">3H", 257 * 9, 0, 65535) * HW[1]) * HW[0]), [[9, 0, 255]]),
    # without a profile: 255 - ink, per channel; black ink 0
    "cmyk tiff": (stored(plain((255, 0, 0, 0), "CMYK"), "TIFF"), [[0, 255, 255]]),
}


@pytest.mark.parametrize(("content", "expected"), FORMATS.values(), ids=list(FORMATS))
def test_formats(content: bytes, expected) -> None:
    assert colours(content) == expected


def test_a_cmyk_jpeg_is_not_inverted() -> None:
    """Within the loss of JPEG: cyan ink alone is 0, 255, 255."""
    ((r, g, b),) = colours(stored(plain((255, 0, 0, 0), "CMYK"), "JPEG", quality=95))
    assert r < 8
    assert min(g, b) > 247


@pytest.mark.parametrize(("orientation", "turned"), [(1, False), (3, False), (6, True), (8, True)])
def test_exif_turns_the_picture(orientation: int, turned: bool) -> None:
    """The stored left half is red. Orientation 6 is shown turned by 90 degrees clockwise: red comes to the top."""
    picture = plain((0, 0, 255))
    picture.paste((255, 0, 0), (0, 0, HW[1] // 2, HW[0]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = stored(picture, "JPEG", quality=95, exif=exif)
    pixels = decode(content)
    hw = HW[::-1] if turned else HW
    assert pixels.shape[:2] == hw == stored_hw(content) == examine(content)
    corner = {1: (2, 2), 3: (-3, -3), 6: (2, -3), 8: (-3, 2)}[orientation]
    assert pixels[corner][0] > 200
    assert pixels[-corner[0] - 1, -corner[1] - 1][2] > 200 or turned


def display_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_a_profile_of_srgb_changes_nothing() -> None:
    assert colours(stored(plain((10, 20, 30)), icc_profile=display_profile())) == [[10, 20, 30]]


def test_colours_of_another_profile_become_srgb() -> None:
    """A profile with the primaries of red and blue exchanged, made from sRGB's own bytes: red is shown blue."""
    profile = bytearray(display_profile())
    tags = {bytes(profile[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(profile[131])}
    red, blue = tags[b"rXYZ"] + 4, tags[b"bXYZ"] + 4
    profile[red : red + 8], profile[blue : blue + 8] = profile[blue : blue + 8], profile[red : red + 8]
    profile = bytes(profile).replace("sRGB".encode("utf-16-be"), "xRGB".encode("utf-16-be")).replace(b"sRGB ", b"xRGB ")
    ((r, g, b),) = colours(stored(plain((255, 0, 0)), icc_profile=profile))
    assert b > 240
    assert max(r, g) < 15


BROKEN = {
    "empty": (b"", "the file is empty"),
    "text": (b"a text file named .png", "not a known image format"),
    "cut png": (stored(plain("red"))[:60], "(?i)truncat"),
    "cut jpeg": (stored(plain("red"), "JPEG")[:-200], "(?i)truncat"),
    "1x1": (stored(Image.new("RGB", (1, 1))), "only 1 x 1 pixels"),
    "gif": (stored(plain("red"), "GIF", save_all=True, append_images=[plain("blue")]), "2 frames"),
    "webp": (stored(plain("red"), "WEBP", save_all=True, append_images=[plain("blue")]), "2 frames"),
    "tiff": (stored(plain("red"), "TIFF", save_all=True, append_images=[plain("blue")]), "2 frames"),
    "float": (stored(plain(0.5, "F"), "TIFF"), "floating-point"),
    "int32": (stored(Image.fromarray(np.full(HW, 70000, np.int32)), "TIFF"), "more than 16 bits"),
    "profile": (stored(plain("red"), icc_profile=b"no profile"), "colour profile"),
    "bomb": (png(1, 0, b"", (20000, 20000)), "decompression bomb"),
}


@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=list(BROKEN))
def test_what_cannot_be_read_says_why(content: bytes, reason: str) -> None:
    for look in (decode, examine):
        with pytest.raises(UnreadableImage, match=reason):
            look(content)


def test_a_large_honest_picture_is_read() -> None:
    """90 megapixels, past the warning of Pillow, which would be an error here if it were not meant."""
    assert examine(stored(Image.new("1", (10000, 9000)))) == (9000, 10000)
