"""What a comparison leaves: pictures, a grid, a table, and one page that explains itself.

Knows files, CSV and HTML; everything that a user wrote is escaped. Must not know models or how pictures are drawn.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from sdft.evaluation.pictures import save_grid
from sdft.evaluation.subjects import Comparison, Question, Subject

THUMBNAIL = 384
"""Longest side of the pictures in the report, in pixels; smaller ones are enlarged by the browser."""
COLUMNS = ("subject", "prompt", "seed", "sampler", "cfg", "steps", "path")

STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfd; --ink: #28282e; --soft: #686874; --line: #dcdce2; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17171b; --ink: #e6e6ea; --soft: #a0a0ac; --line: #36363e; }
}
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .5rem 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p, figcaption, th { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); overflow-wrap: normal; }
td:nth-child(4) { font-variant-numeric: tabular-nums; }
.row { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem; }
figure { margin: 0; }
img { display: block; width: 100%; border-radius: 4px; }
img.small { image-rendering: pixelated; }
figcaption { font-size: .9rem; }
figcaption b { color: var(--ink); font-weight: 600; }
"""
# No script and nothing from outside, whatever a prompt says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Row:
    """One subject's pictures, N x H x W x 3 bytes, and their scores, in the order of the questions."""

    subject: Subject
    images: np.ndarray
    clip_scores: list[float] | None = None

    def path(self, index: int) -> str:
        """Of a picture, relative to the run folder."""
        return f"images/{self.subject.name}/{index}.png"

    @property
    def mean_score(self) -> float | None:
        return None if self.clip_scores is None else sum(self.clip_scores) / len(self.clip_scores)


def write_images(folder: Path, row: Row) -> None:
    """`images/<subject>/<n>.png`, at full size."""
    for index, image in enumerate(row.images):
        path = folder / row.path(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def write_grid(path: Path, comparison: Comparison, rows: Sequence[Row]) -> None:
    """One picture of all: a row a subject, a column a question."""
    columns = [title(question, comparison.seeds) for question in comparison.questions]
    save_grid(path, [row.images for row in rows], [row.subject.name for row in rows], columns)


def write_results(path: Path, comparison: Comparison, rows: Sequence[Row]) -> None:
    """`results.csv`: one line a picture; a column for the CLIP score where there is a judge."""
    sampler, scored = comparison.sampler, all(row.clip_scores is not None for row in rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*COLUMNS, "clip_score"] if scored else COLUMNS)
        for row in rows:
            for index, asked in enumerate(comparison.questions):
                line = [row.subject.name, asked.prompt, asked.seed, sampler.name, sampler.cfg, sampler.steps]
                score = [f"{row.clip_scores[index]:.4f}"] if row.clip_scores is not None and scored else []
                table.writerow([*line, row.path(index), *score])


def write_report(path: Path, comparison: Comparison, rows: Sequence[Row]) -> None:
    """`report.html`: one file that needs no other and no network."""
    names = ", ".join(row.subject.name for row in rows)
    sections = "\n".join(_section(index, comparison, rows) for index in range(len(comparison.questions)))
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{escape(names)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(names)}</h1>
<p>{escape(_settings(comparison))}</p>
{_subjects(rows)}
{sections}
</body>
</html>
"""
    path.write_text(page, encoding="utf-8")


def title(question: Question, num_seeds: int) -> str:
    """The prompt, with the seed where there are several."""
    return question.prompt if num_seeds == 1 else f"{question.prompt} (seed {question.seed})"


def _settings(comparison: Comparison) -> str:
    """How all pictures were drawn, in one sentence."""
    sampler = comparison.sampler
    negative = f", away from “{sampler.negative}”" if sampler.negative else ""
    seeds = "seed 0" if comparison.seeds == 1 else f"seeds 0 to {comparison.seeds - 1}"
    return f"{sampler.name}, {sampler.steps} steps, cfg {sampler.cfg:g}{negative}, {comparison.size} px, {seeds}."


def _subjects(rows: Sequence[Row]) -> str:
    """The table of who is compared; the mean CLIP score where there is a judge."""
    scored = all(row.clip_scores is not None for row in rows)
    lines = []
    for row in rows:
        cells = [row.subject.name, row.subject.kind, row.subject.source, *([_score(row.mean_score)] if scored else [])]
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{cell}</th>" for cell in ("subject", "what", "from", *(["mean CLIP score"] if scored else [])))
    return f'<div class="scroll"><table>\n<tr>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"


def _section(index: int, comparison: Comparison, rows: Sequence[Row]) -> str:
    """One question and what each subject drew."""
    asked = title(comparison.questions[index], comparison.seeds)
    figures = "\n".join(_figure(row, index, asked) for row in rows)
    return f'<section>\n<h2 dir="auto">{escape(asked)}</h2>\n<div class="row">\n{figures}\n</div>\n</section>'


def _figure(row: Row, index: int, asked: str) -> str:
    score = "" if row.clip_scores is None else f" {_score(row.clip_scores[index])}"
    small = ' class="small"' if max(row.images[index].shape[:2]) <= THUMBNAIL // 2 else ""
    alt = escape(f"{row.subject.name}: {asked}")
    return (
        f'<figure><img{small} src="data:image/png;base64,{thumbnail(row.images[index])}" alt="{alt}">'
        f"<figcaption><b>{escape(row.subject.name)}</b>{score}</figcaption></figure>"
    )


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.3f}"


def thumbnail(image: np.ndarray) -> str:
    """A picture as PNG in base64, its longest side at most THUMBNAIL."""
    small = Image.fromarray(image)
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")
