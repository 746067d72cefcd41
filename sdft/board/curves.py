"""Curves of a run, reduced to what a chart can show, and what each of them is."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

from scipy.special import stdtrit

MOST_POINTS = 400
"""Of a curve on a page: a chart is about as many pixels wide."""
METRICS_CSV, WATCHED = "metrics.csv", "watch/measurements.jsonl"


def reduced(curve: Mapping[int, float], most: int = MOST_POINTS) -> dict[str, list[float]]:
    """A curve of at most `most` points: of each stretch of steps the last step, the mean, and the extremes.

    curve: {steps done: value}, in order. `low` and `high` are left out where no stretch has several values.
    """
    steps, values = list(curve), list(curve.values())
    size = max(1, -(-len(steps) // most))
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    found: dict[str, list[float]] = {
        "x": [steps[min(i + size, len(steps)) - 1] for i in range(0, len(steps), size)],
        "y": [short(math.fsum(part) / len(part)) for part in parts],
    }
    if size > 1:
        found |= {"low": [short(min(part)) for part in parts], "high": [short(max(part)) for part in parts]}
    return found


def short(value: float) -> float:
    """Five significant digits, which a chart cannot show the loss of."""
    return float(f"{value:.5g}")


def read_metrics_csv(run_dir: Path) -> dict[str, dict[int, float]]:
    """The curves of Lightning's metrics.csv, for runs without a history. What cannot be read is left out."""
    file = run_dir / METRICS_CSV
    if not file.is_file():
        return {}
    curves: dict[str, dict[int, float]] = {}
    with file.open(newline="", encoding="utf-8", errors="replace") as opened:
        for row in csv.DictReader(opened):
            numbers = {name: number for name, text in row.items() if name and (number := finite(text)) is not None}
            step = numbers.pop("step", None)
            numbers.pop("epoch", None)
            if step is None:
                continue
            done = int(step) + 1  # Lightning counts steps from 0
            for name, value in numbers.items():
                curves.setdefault(name, {})[done] = value
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def finite(text: Any) -> float | None:
    """The finite number that a text is; None for any other."""
    try:
        number = float(text)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def read_watched(run_dir: Path) -> dict[str, dict[str, list[float]]]:
    """The curves of what was measured on pictures, as `reduced` gives them, from the base model at step 0 on.

    `low` and `high` are a 95 % interval of the mean over the pictures. What cannot be read is left out.
    """
    file = run_dir / WATCHED
    if not file.is_file():
        return {}
    found: dict[str, dict[int, list[float]]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            measured = json.loads(line)
            for name, values in measured["values"].items():
                numbers = [number for value in values if (number := finite(value)) is not None]
                if numbers:
                    found.setdefault(f"watch/{name}", {})[int(measured["step"])] = numbers
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return {name: with_interval(dict(sorted(steps.items()))) for name, steps in found.items()}


def with_interval(steps: Mapping[int, list[float]]) -> dict[str, list[float]]:
    """A curve of means with their 95 % intervals, by Student's t as everywhere else.

    steps: {steps done: the values of the pictures}.
    """
    means = [math.fsum(values) / len(values) for values in steps.values()]
    wide = [half_width(values) if len(values) > 1 else 0.0 for values in steps.values()]
    return {
        "x": list(steps),
        "y": [short(mean) for mean in means],
        "low": [short(mean - half) for mean, half in zip(means, wide, strict=True)],
        "high": [short(mean + half) for mean, half in zip(means, wide, strict=True)],
    }


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of at least two values."""
    return float(stdtrit(len(values) - 1, 0.975)) * stdev(values) / len(values) ** 0.5
