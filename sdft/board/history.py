"""history.jsonl: every value that a run logged, by optimizer step, whatever `logger=` is; a line for each event.

A run that is resumed repeats the steps after its checkpoint: what was recorded of them before no longer counts.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

NAME = "history.jsonl"
End = Literal["finished", "stopped", "failed"]


@dataclass
class Record:
    """What the history of a run says.

    curves: name -> {optimizer steps done: value}, in the order of the steps. times: {steps done: Unix time}, of the
    current start alone. start: what was noted when the run was last started; empty if the folder has no history.
    trained: whether training is over. end: how the run ended; None while it goes on. reason: of an end that is not
    `finished`. updated: Unix time of the last line.
    """

    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)
    start: dict[str, Any] = field(default_factory=dict)
    num_starts: int = 0
    first_started: float | None = None
    trained: bool = False
    end: End | None = None
    reason: str = ""
    updated: float | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done, as far as is known."""
        return max(self.times, default=int(self.start.get("step", 0)))

    @property
    def latest(self) -> dict[str, float]:
        """The last value of each curve."""
        return {name: curve[max(curve)] for name, curve in self.curves.items() if curve}


class History:
    """Appends to the history of a run folder. Each line is written at once, so that a killed run loses none."""

    def __init__(self, run_dir: Path):
        self.file = run_dir / NAME

    def start(self, step: int, max_steps: int, **notes: Any) -> None:
        """The run starts, or goes on after `step` steps."""
        self._append({"event": "start", "step": step, "max_steps": max_steps, **notes})

    def values(self, step: int, values: Mapping[str, float]) -> None:
        """Values that were logged when `step` optimizer steps were done. Those that are not finite are left out."""
        kept = {name: float(f"{value:.7g}") for name, value in values.items() if math.isfinite(value)}
        if kept:
            self._append({"step": step, "values": kept})

    def trained(self, step: int) -> None:
        """Training is over; the weights are written and judged next."""
        self._append({"event": "trained", "step": step})

    def end(self, how: End, reason: str = "", when: float | None = None) -> None:
        """The run ends. when: Unix time, if it was not now."""
        self._append({"event": "end", "how": how, "reason": reason} | ({} if when is None else {"time": when}))

    def _append(self, line: dict[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **line}, ensure_ascii=False) + "\n")


def read_history(run_dir: Path) -> Record:
    """The record of a run folder; without history.jsonl, that of its metrics.csv, else an empty one."""
    record = Record()
    for line in _lines(run_dir / NAME):
        record.updated = line["time"]
        match line.get("event"):
            case "start":
                _begin(record, line)
            case "trained":
                record.trained = True
                record.times[int(line.get("step", record.step))] = line["time"]
            case "end":
                record.end, record.reason = line.get("how", "stopped"), str(line.get("reason", ""))
            case None:
                step = int(line["step"])
                record.times.setdefault(step, line["time"])
                for name, value in filter(is_finite, line["values"].items()):
                    record.curves.setdefault(name, {})[step] = value
    record.curves = {name: dict(sorted(curve.items())) for name, curve in record.curves.items()}
    return record


def _begin(record: Record, line: dict[str, Any]) -> None:
    """Forget the steps that this start will repeat."""
    step = int(line["step"])
    for curve in record.curves.values():
        for later in [done for done in curve if done > step]:
            del curve[later]
    record.curves = {name: curve for name, curve in record.curves.items() if curve}
    record.times = {step: line["time"]}
    record.start, record.num_starts = line, record.num_starts + 1
    record.first_started = record.first_started if step and record.first_started else line["time"]
    record.trained, record.end, record.reason = False, None, ""


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines that can be read: a full disk or a kill may have cut one short."""
    if not file.is_file():
        return
    with file.open(encoding="utf-8", errors="replace") as opened:
        for text in opened:
            try:
                line = json.loads(text)
                if sound(line):
                    yield line
            except (ValueError, RecursionError):
                continue


def is_finite(item: tuple[str, float]) -> bool:
    """Whether a named value is a number that a chart can show."""
    return math.isfinite(item[1])


def sound(line: Any) -> bool:
    """Whether a line has what its reader takes from it."""
    if not isinstance(line, dict) or not isinstance(line.get("time"), int | float):
        return False
    if line.get("event") in ("trained", "end"):
        return True
    if not isinstance(line.get("step"), int):
        return False
    if line.get("event") == "start":
        return isinstance(line.get("max_steps"), int)
    values = line.get("values")
    return isinstance(values, dict) and all(isinstance(value, int | float) for value in values.values())
