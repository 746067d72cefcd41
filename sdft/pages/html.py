"""Writes a page as one file.

All texts of users are embedded as data and never as markup, and a security policy allows only what is in the file.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

HERE = Path(__file__).parent
MAX_TOTAL_PIXELS = 70_000_000
"""Pixels of all thumbnails of a page together."""
QUALITY = 78
LOSSLESS = 4
"""Ratio of bytes per pixel, lossless to lossy: an image smaller than the limit by this ratio is embedded losslessly."""


HEAD = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
""")


def page(folder: Path, name: str, title: str, scripts: Sequence[str], data: Any, styles: Sequence[str] = ()) -> str:
    """The page whose body is `NAME.html` in a folder, with its style `NAME.css`, its scripts and its data.

    title: plain words. scripts: in the order of their dependencies, of the folder or of this package, behind those that
    all pages share. data: what `json_text` takes. styles: names of further styles in the folder, before its own.
    """
    looks = (HERE / "base.css", *(folder / f"{style}.css" for style in (*styles, name)))
    style = "\n".join(file.read_text(encoding="utf-8") for file in looks)
    own = (folder / f"{script}.js" for script in scripts)
    files = (HERE / "elements.js", HERE / "theme.js", *(file if file.is_file() else HERE / file.name for file in own))
    script = "\n".join(file.read_text(encoding="utf-8") for file in files)
    policy = (
        f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; "
        "img-src 'self' file: data:; base-uri 'none'; form-action 'none'"
    )
    body = Template((folder / f"{name}.html").read_text(encoding="utf-8"))
    head = HEAD.substitute(policy=policy, title=title, style=style)
    return f"{head}{body.substitute(script=script, data=json_text(data))}</html>\n"


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is either the old or the new one."""
    unfinished = path.with_name(f"{path.name}.partial")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    unfinished.replace(path)


def digest(text: str) -> str:
    """The hash by which a Content-Security-Policy allows an inline element."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def json_text(value: Any) -> str:
    """JSON for a script element: escaped so that no text can end the element or begin another."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def storage_key(content: Any) -> str:
    """The key of a page in the browser's storage: the same page opened again finds what was left there, another page
    does not. content: what `json_text` takes."""
    return hashlib.sha256(json_text(content).encode()).hexdigest()[:16]


def thumbnail_side(num: int, longest: int) -> int:
    """The side of `num` thumbnails, at most `longest`, so that a page stays at about 40 MB: a pixel takes 0.1 to 0.4
    bytes in WebP of this quality, and base64 a third more."""
    return min(longest, math.isqrt(MAX_TOTAL_PIXELS // max(1, num)))


def thumbnail(image: Image.Image, side: int) -> dict[str, Any]:
    """A thumbnail as WebP in a data URI, at most `side` pixels wide and high, and the size of the original."""
    width, height = image.size
    image = image.convert("RGB")
    whole = width * height * LOSSLESS <= side * side
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=whole, quality=QUALITY, method=4)
    uri = "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    return {"uri": uri, "width": width, "height": height, "whole": whole}
