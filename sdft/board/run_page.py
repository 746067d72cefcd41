"""Writes `index.html` of a run: state, curves, previews, verdict and files, from what is in its folder alone."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdft.board.curves import read_metrics_csv, read_watched, reduced
from sdft.board.history import NAME, Record, read_history
from sdft.board.outputs import choice_of, files_of, receipt_of, summary_of, verdict_of
from sdft.board.previews import OF_BEFORE_AFTER, picture, previews_of
from sdft.board.state import early_forecast, seconds_trained, state_of
from sdft.formats.json_file import json_if_readable
from sdft.formats.run_folder import BEFORE_AFTER
from sdft.pages import html

HERE = Path(__file__).parent / "page"
PAGE = "index.html"
TRAINING_PICTURES, FORECAST = "training_pictures.json", "forecast.json"
WARNINGS = ("left out:", "will not be measured:")
"""Of the lines that a run says of itself before it starts, what one should know."""
SCRIPTS = ("plot", "table", "curves", "names", "shown", "refresh", "run")
STYLES = ("board",)


def write_run_page(run_dir: Path, every: float = 15.0) -> Path:
    """Write the page of a run folder, whatever state the run is in, and return its path.

    every: seconds after which a page of a run that goes on loads itself again.
    """
    path = run_dir / PAGE
    data = finite({**run_data(run_dir), "every": every})
    html.write_whole(path, html.page(HERE, "run", "Run", SCRIPTS, data, STYLES))
    return path


def run_data(run_dir: Path) -> dict[str, Any]:
    """What the page shows, as JSON."""
    record, summary, receipt = recorded(run_dir), summary_of(run_dir), receipt_of(run_dir)
    config: dict[str, Any] = receipt["config"] if isinstance(receipt.get("config"), dict) else {}
    state = state_of(record, summary)
    lines = [str(line).strip() for line in record.start.get("lines", [])]
    over = state["what"] in ("finished", "unknown")
    return {
        "id": html.storage_key(str(run_dir.resolve())),
        "name": str(config.get("name") or (summary or {}).get("name") or run_dir.resolve().name),
        "folder": str(run_dir),
        "written": round(time.time(), 1),
        "state": state,
        "curves": {name: reduced(curve) for name, curve in record.curves.items()} | read_watched(run_dir),
        "previews": previews_of(run_dir),
        "before_after": picture(run_dir, run_dir / BEFORE_AFTER, OF_BEFORE_AFTER) if over else None,
        "verdict": verdict_of(summary) if summary and over else [],
        "files": files_of(run_dir) if over else [],
        "choice": choice_of(run_dir),
        "training_pictures": training_pictures(run_dir),
        "overrides": [str(word) for word in receipt.get("overrides") or []],
        "config": list(flattened(config)),
        "plan": planned(run_dir, record),
        "lines": lines,
        "warnings": [line for line in lines if any(text in line for text in WARNINGS)],
    }


def write_forecast(run_dir: Path, figures: Mapping[str, float]) -> None:
    """Write what was forecast of a run: `device_gib`, `host_gib`, `train_seconds`, of which any may be missing."""
    html.write_whole(run_dir / FORECAST, json.dumps(dict(figures), indent=2) + "\n")


def planned(run_dir: Path, record: Record) -> dict[str, Any]:
    """The forecast of a run, and what became of it: numbers, null where nothing is known."""
    found = json_if_readable(run_dir / FORECAST)
    said = found if isinstance(found, dict) else {}
    numbers = {name: said.get(name) for name in ("device_gib", "host_gib", "train_seconds")}
    return {
        "forecast": {name: value if isinstance(value, int | float) else None for name, value in numbers.items()},
        "early": early_forecast(record),
        "seconds": seconds_trained(record),
        "most_gib": record.latest.get("memory/most"),
        "on_gpu": str(record.start.get("device", "cpu")).startswith("cuda"),
    }


def recorded(run_dir: Path) -> Record:
    """The history of a run; for one of an earlier version, the curves of its metrics.csv."""
    record = read_history(run_dir)
    if not (run_dir / NAME).is_file():
        record.curves = read_metrics_csv(run_dir)
    return record


def training_pictures(run_dir: Path) -> list[dict[str, Any]]:
    """Some of the training pictures with their captions, which the run wrote down; empty without them."""
    found = json_if_readable(run_dir / TRAINING_PICTURES)
    return [
        {"key": str(item["key"]), "captions": [str(text) for text in item["captions"]], "thumbnail": item["thumbnail"]}
        for item in (found if isinstance(found, list) else [])
        if isinstance(item, dict) and {"key", "captions", "thumbnail"} <= item.keys()
    ]


def finite(data: Any) -> Any:
    """The data with null for numbers that are not finite, which JSON does not have."""
    if isinstance(data, Mapping):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def flattened(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, value as text) of every value of a nested config."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{name}.")
        else:
            yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
