"""The jobs of a sweep: which are finished, how a single one is run, and the table of their results."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sdft.config.command import ERROR, quoted
from sdft.config.trust import read_yaml
from sdft.errors import UserError
from sdft.formats.json_file import read_json
from sdft.formats.run_folder import read_summary
from sdft.training import receipt

FIGURES = {"style_gain": "style gain", "adherence": "adherence", "train_seconds": "seconds"}
FALLBACK = "val/eps_mse"
"""Ranks the jobs if none could measure the metric of the sweep."""
LOWER_IS_BETTER = re.compile(r"val/.*|distance_.*|export_error/.*|train_seconds|num_.*")


def finished(job: Path, overrides: list[str]) -> dict | None:
    """The summary of a finished job, otherwise None.

    Raises UserError if the folder has a finished job of another command.
    """
    summary, file = read_summary(job), job / receipt.NAME
    if summary is None or not file.is_file():
        return None
    before = read_json(file)
    if "outputs" not in before:
        return None
    recorded = before.get("overrides") or []
    now, then = ([w for w in map(str, words) if not w.startswith("resume=")] for words in (overrides, recorded))
    if now != then:
        raise UserError(
            f"hydra.sweep.dir: {job} has a finished job of another sweep ({' '.join(then)}); a larger grid "
            "numbers its jobs differently, so give it another hydra.sweep.dir"
        )
    return summary


def run_apart(job: Any) -> None:
    """Run a job, as Hydra describes it, as a separate command, which writes to the same folder.

    For jobs of several processes: Lightning starts the others with the command line of the first, which would be that
    of the whole sweep, and leaves environment variables with which the next job would be taken for one of them.
    Raises UserError if it fails.
    """
    folder = Path(job.runtime.output_dir)
    places = [source.path for source in job.runtime.config_sources if source.provider == "command-line"]
    words = [f"--config-name={job.job.config_name}", *(f"--config-dir={place}" for place in places)]
    words += [word for word in (*job.overrides.hydra, *job.overrides.task) if not word.startswith("hydra.mode=")]
    words += [f"hydra.job.num={job.job.num}", f"hydra.run.dir={quoted(folder)}"]
    status = subprocess.run([*this_command(), *words], check=False).returncode
    if status:
        problem = folder / ERROR
        found = problem.read_text(encoding="utf-8").strip() if problem.is_file() else f"ended with status {status}"
        raise UserError(found)


def this_command() -> list[str]:
    """The start of the command line that runs this program again: a script, a console script or `python -m`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [sys.executable, *(["-m", spec.name] if spec else [sys.argv[0]])]


def print_table(sweep_dir: Path) -> None:
    """Print and write one row for each job, the best by the sweep's metric first.

    A value that was not measured is a dash. If no job has the metric, they are ranked by `FALLBACK`, with a note.
    """
    rows = [_row(*job) for job in jobs_of(sweep_dir)]
    if not rows:
        return
    metric, note = _ranking(rows)
    keys = dict.fromkeys(key for row in rows for key in row["overrides"])
    varied = [key for key in keys if len({row["overrides"].get(key) for row in rows}) > 1]
    shown = dict.fromkeys([*(row["metric"] for row in rows), metric])
    named = FIGURES | {name: name for name in shown if name and name not in FIGURES}
    rows.sort(key=partial(_rank, metric))
    cells = [[*varied, *named.values(), "folder"]]
    for row in rows:
        values = [_formatted(row.get(name)) for name in named]
        cells.append([*(row["overrides"].get(key, "") for key in varied), *values, row["folder"]])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]
    failed = (f"{row['folder']} failed: {row['error']}" for row in rows if "error" in row)
    table = "\n".join([*lines, *failed, *([note] if note else [])])
    written = sweep_dir / f".table.{os.getpid()}.partial"  # the tasks of an array may end together
    written.write_text(table + "\n", encoding="utf-8")
    written.replace(sweep_dir / "table.txt")
    print(f"\n{table}\n\nwritten to {sweep_dir / 'table.txt'}")


def jobs_of(sweep_dir: Path) -> list[tuple[Path, dict[str, str], dict]]:
    """Folder, overrides and summary of each job, in order; the summary of an unfinished job is empty."""
    found = []
    for job in sorted((job for job in sweep_dir.glob("*") if (job / ".hydra").is_dir()), key=_order):
        file = job / ".hydra" / "overrides.yaml"
        words = read_yaml(file) or []
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"{file}: is not the list of a job's overrides; move {job} out of the sweep")
        found.append((job, dict(word.partition("=")[::2] for word in words), read_summary(job) or {}))
    return found


def _row(job: Path, overrides: dict[str, str], summary: dict) -> dict:
    config = read_yaml(job / ".hydra" / "config.yaml")
    metric = config.get("metric") if isinstance(config, dict) else None
    row = {"overrides": overrides, "folder": job.name, "metric": metric} | summary
    if not summary and (job / ERROR).is_file():
        row["error"] = (job / ERROR).read_text(encoding="utf-8").strip()
    return row


def _order(job: Path) -> tuple[int, str]:
    return (int(job.name) if job.name.isdigit() else 10**9, job.name)


def _ranking(rows: Sequence[dict]) -> tuple[str, str]:
    """The metric that ranks the jobs, and a note if it is not the sweep's."""
    wanted = next((row["metric"] for row in rows if row["metric"]), FALLBACK)
    done = [row for row in rows if "train_seconds" in row]
    if not done or any(row.get(wanted) is not None for row in done):
        return wanted, ""
    why = next((row[f"{wanted}_note"] for row in done if f"{wanted}_note" in row), "not in the summaries")
    if any(row.get(FALLBACK) is not None for row in done):
        return FALLBACK, f"ranked by {FALLBACK}, as no job has {wanted} ({why})"
    return wanted, f"not ranked, as no job has {wanted} ({why}); choose another metric="


def _rank(metric: str, row: dict) -> float:
    """Sorts the best first, and jobs without the metric last."""
    value = row.get(metric)
    if not isinstance(value, int | float):
        return math.inf
    return value if LOWER_IS_BETTER.fullmatch(metric) else -value


def _formatted(value: float | None) -> str:
    return "-" if not isinstance(value, int | float) else f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"
