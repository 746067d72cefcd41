"""The table at the end of a sweep: what each job changed and what came of it."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

FIGURES = {"style_gain": "style gain", "adherence": "adherence", "train_seconds": "seconds"}


def print_table(sweep_dir: Path) -> None:
    """One row a job, the best style gain first; a job without a figure shows a dash."""
    rows = [{"said": said, "folder": job.name} | summary for job, said, summary in jobs_of(sweep_dir)]
    varied = sorted({key for row in rows for key in row["said"]}, key=lambda key: [*rows[0]["said"], key].index(key))
    varied = [key for key in varied if len({row["said"].get(key) for row in rows}) > 1]
    rows.sort(key=_gain, reverse=True)
    cells = [[*varied, *FIGURES.values(), "folder"]]
    for row in rows:
        figures = [_figure(row.get(name)) for name in FIGURES]
        cells.append([*(row["said"].get(key, "") for key in varied), *figures, row["folder"]])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    table = "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)
    (sweep_dir / "table.txt").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nwritten to {sweep_dir / 'table.txt'}")


def jobs_of(sweep_dir: Path) -> list[tuple[Path, dict[str, str], dict]]:
    """Folder, what was said, and summary of each job in order; no summary where a job did not finish."""
    found = []
    for job in sorted(sweep_dir.iterdir(), key=_order):
        if not (job / ".hydra").is_dir():
            continue
        words = yaml.safe_load((job / ".hydra" / "overrides.yaml").read_text(encoding="utf-8")) or []
        summary = job / "summary.json"
        told = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
        found.append((job, dict(word.split("=", 1) for word in words), told))
    return found


def _order(job: Path) -> tuple[int, str]:
    return (int(job.name) if job.name.isdigit() else 10**9, job.name)


def _gain(row: dict) -> float:
    gain = row.get("style_gain")
    return -1e9 if gain is None else gain


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"
