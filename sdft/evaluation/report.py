"""A plain page of a comparison, until `page/` has the whole one. Everything that a user wrote is escaped."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from sdft.evaluation.results import Results

THUMBNAIL = 384
# No script and nothing from outside, whatever a prompt says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = "body { color-scheme: light dark; font: 1rem/1.5 system-ui } img { width: 9rem }"


def write_page(path: Path, results: Results) -> None:
    """`report.html`: one file that needs no other and no network."""
    figures = "\n".join(
        f'<figure><img src="data:image/png;base64,{thumbnail(path.parent / picture.path)}">'
        f"<figcaption>{escape(picture.subject)}: {escape(str(dict(picture.axes)))}</figcaption></figure>"
        for picture in results.pictures
    )
    sentences = "\n".join(f"<p>{escape(verdict.sentence)}</p>" for verdict in results.verdicts)
    page = f"""<!doctype html>
<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(results.title)}</title><style>{STYLE}</style>
<h1>{escape(results.title)}</h1>
{sentences}
{figures}
"""
    path.write_text(page, encoding="utf-8")


def thumbnail(path: Path) -> str:
    """A picture as PNG in base64, its longest side at most THUMBNAIL."""
    with Image.open(path) as small:
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        small.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
