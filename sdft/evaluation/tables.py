"""The files of a comparison besides the page: a table with a row per image, all results as JSON, a contact sheet."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdft.evaluation.image_grid import save_grid
from sdft.evaluation.results import Estimate, ImageResult, Results

MAX_ROWS, MAX_COLUMNS = 40, 24
"""Of the contact sheet; more would be too small to see."""


def write_tables(folder: Path, results: Results) -> list[Path]:
    """Write `results.csv`, `results.json` and, if pyarrow is installed, `results.parquet`."""
    rows, written = picture_rows(results), [folder / "results.csv", folder / "results.json"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)
    (folder / "results.json").write_text(json.dumps(as_json(results), indent=1, ensure_ascii=False), encoding="utf-8")
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return written
    values = {name: [row.get(name) for row in rows] for name in columns}
    typed = {name: _of_one_type(column) for name, column in values.items()}
    pyarrow.parquet.write_table(pyarrow.table(typed), folder / "results.parquet")
    return [*written, folder / "results.parquet"]


def picture_rows(results: Results) -> list[dict[str, Any]]:
    """One row per image: subject, axes, settings, metrics, path."""
    varied = {subject.name: subject.varied for subject in results.subjects}
    return [
        {"subject": p.subject, **p.axes, **p.settings, **varied[p.subject], **p.figures, "path": p.path}
        for p in results.pictures
    ]


def as_json(results: Results) -> dict[str, Any]:
    """The results as JSON types; NaN and infinity become null."""
    data = asdict(results)
    for heat_map in data["heat_maps"]:
        heat_map["cells"] = [{"row": r, "column": c, **cell} for (r, c), cell in heat_map["cells"].items()]
    return _finite(data)


def write_contact_sheet(path: Path, results: Results) -> None:
    """Write one image with all images: a row per subject, a column per prompt, seed and setting; at most 40 x 24."""
    folder = path.parent
    rows: dict[str, dict[tuple, ImageResult]] = {}
    columns: dict[tuple, str] = {}
    for picture in results.pictures:
        key = tuple(picture.axes.items())
        columns.setdefault(key, _title(picture.axes, results))
        rows.setdefault(picture.subject, {})[key] = picture
    shown = list(columns)[:MAX_COLUMNS]
    first = results.pictures[0]
    with Image.open(folder / first.path) as opened:
        size = opened.size
    tiles, names = [], list(rows)[:MAX_ROWS]
    for name in names:
        found = [rows[name].get(key) for key in shown]
        blank = np.full((size[1], size[0], 3), 255, np.uint8)
        tiles.append(np.stack([blank if p is None else _tile(folder / p.path, size) for p in found]))
    save_grid(path, tiles, names, [columns[key] for key in shown])


def terminal_table(results: Results) -> str:
    """A row per subject, a column per metric, with 95 % intervals."""
    metrics = [metric for metric in results.metrics if any(metric.name in own for own in results.figures.values())]
    cells = [["", *(f"{m.label} {ARROWS[m.better]}".strip() for m in metrics)]]
    for subject in results.subjects:
        own = results.figures.get(subject.name, {})
        cells.append([subject.name, *(_with_interval(own.get(metric.name)) for metric in metrics)])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)


ARROWS = {"higher": "↑", "lower": "↓", None: ""}


def _with_interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3g}"
    return f"{estimate.value:.3g} ({estimate.low:.3g} … {estimate.high:.3g})"


def _title(axes, results: Results) -> str:
    """The prompt and the values of the other axes that vary."""
    others = [
        f"{name} {value}"
        for name, value in axes.items()
        if name != "prompt" and len(results.axes.get(name, ())) > 1
    ]
    return " ".join([str(axes.get("prompt", "")), *([f"({', '.join(others)})"] if others else [])])


def _tile(path: Path, size: tuple[int, int]) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS))


def _of_one_type(column: Sequence[Any]) -> Sequence[Any]:
    """The column with one type: numbers stay numbers, mixed types become text."""
    kinds = {type(value) for value in column if value is not None}
    if kinds <= {int, float}:
        return [None if value is None else float(value) for value in column] if len(kinds) > 1 else column
    return column if len(kinds) <= 1 else [None if value is None else str(value) for value in column]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
