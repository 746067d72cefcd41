"""Writes one page over many runs: a table, small curves and pictures side by side, and links to the runs' own pages."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdft.board.curves import read_watched, reduced
from sdft.board.history import NAME
from sdft.board.outputs import receipt_of, summary_of
from sdft.board.previews import FOLDER, evenly, numbered, picture
from sdft.board.run_page import HERE, PAGE, STYLES, finite, flattened, recorded, write_run_page
from sdft.board.state import state_of
from sdft.formats.run_folder import BEFORE_AFTER, RECEIPT, SUMMARY
from sdft.pages import html

SCRIPTS = ("plot", "table", "curves", "names", "runs")
MARKS = (NAME, RECEIPT, SUMMARY)
"""Files of which a run folder has at least one."""
DEPTH = 4
"""Folders between a folder of runs and a run."""
POINTS, SIDE = 80, 480
"""Of a small curve, and of the picture of a run."""
MOST_KEYS = 10
"""Settings that are shown because they differ."""
OWN = ("run_dir", "name", "resume", "hydra", "reproduce", "trust", "dry_run", "logger")
"""Settings without influence on the weights."""
FIRST_FIGURES = ("style_gain", "identity", "adherence", "val/eps_mse")
HIDDEN_FIGURES = ("export_error", "num_", "distance_", "quantization_error", "style_gain_", "val/loss")
"""Starts of the names of figures that have no column of their own."""


def runs_in(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The run folders below a folder, in the order of their names; nothing is looked for inside of them."""
    for path in sorted((path for path in folder.iterdir() if path.is_dir()), key=order):
        if any((path / name).is_file() for name in MARKS):
            yield path
        elif depth > 1 and not path.is_symlink():
            yield from runs_in(path, depth - 1)


def order(path: Path) -> tuple[int, str]:
    """Jobs of a sweep by their number, other folders by name."""
    return (int(path.name) if path.name.isdigit() else -1, path.name)


def write_runs_page(folder: Path, runs: Sequence[Path]) -> Path:
    """Write the page of these runs into a folder above them, and return its path. Runs without a page get theirs."""
    for run in runs:
        if not (run / PAGE).is_file():
            write_run_page(run)
    configs = [receipt_of(run) for run in runs]
    varied = differing(configs)
    data = {
        "id": html.storage_key(str(folder.resolve())),
        "folder": str(folder),
        "written": round(time.time(), 1),
        "varied": list(dict.fromkeys(key for one in varied for key in one)),
        "runs": [
            {**run_row(folder, run), "varied": own}
            for run, own in zip(runs, varied, strict=True)
        ],
    }  # fmt: skip
    html.write_whole(folder / PAGE, html.page(HERE, "runs", "Runs", SCRIPTS, finite(data), STYLES))
    return folder / PAGE


def run_row(folder: Path, run: Path) -> dict[str, Any]:
    """What the page says of one run. Paths are relative to the folder of the page."""
    record, summary = recorded(run), summary_of(run)
    path = Path(os.path.relpath(run, folder)).as_posix()
    curves = {name: reduced(curve, POINTS) for name, curve in record.curves.items() if shows(name)}
    return {
        "path": path,
        "state": state_of(record, summary),
        "figures": figures(summary or {}, record.latest),
        "curves": curves | read_watched(run),
        "picture": picture_of(folder, run),
    }


def shows(curve: str) -> bool:
    """Whether a curve can be chosen on the page of many runs."""
    return curve.startswith(("train/", "val/", "watch/"))


def figures(summary: Mapping[str, Any], latest: Mapping[str, float]) -> dict[str, float]:
    """The figures of a run: those of its summary, or the last validation of one that is not finished."""
    found = {name: value for name, value in latest.items() if name == "val/eps_mse"}
    for name, value in summary.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and not name.startswith(HIDDEN_FIGURES):
            found[name] = value
    first = [name for name in FIRST_FIGURES if name in found]
    return {name: found[name] for name in [*first, *(name for name in found if name not in first)]}


def picture_of(folder: Path, run: Path) -> dict[str, Any] | None:
    """before_after.png, else the last grid of previews; None without pictures."""
    grids = [path for _, path in numbered((run / FOLDER).glob("step_*.png"))]
    for path in (run / BEFORE_AFTER, *reversed(grids)):
        if small := picture(run, path, SIDE):
            return {**small, "file": Path(os.path.relpath(path, folder)).as_posix()}
    return None


def differing(receipts: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """For each run, the settings in which the runs differ.

    Those that a command line named, if they differ, since a group such as `experiment=` stands for many; otherwise, as
    for runs from Python, the values of the configs.
    """
    configs = [dict(flattened(receipt.get("config") or {})) for receipt in receipts]
    named = [words_of(receipt) for receipt in receipts]
    keys = dict.fromkeys(key for words in named for key in words)
    rows = [
        {key: words.get(key, config.get(key, "")) for key in keys} for words, config in zip(named, configs, strict=True)
    ]
    found = only_differing(rows)
    return found if any(found) else only_differing(configs)


def words_of(receipt: Mapping[str, Any]) -> dict[str, str]:
    """Key -> value of the overrides of a run."""
    words = [word.partition("=") for word in receipt.get("overrides") or [] if isinstance(word, str)]
    return {key.lstrip("+"): value for key, _, value in words}


def only_differing(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The rows with the keys whose values differ, at most MOST_KEYS of them."""
    keys = dict.fromkeys(key for row in rows for key in row)
    told = [key for key in keys if key.split(".")[0] not in OWN and len({row.get(key, "") for row in rows}) > 1]
    return [{key: row.get(key, "") for key in evenly(told, MOST_KEYS)} for row in rows]
