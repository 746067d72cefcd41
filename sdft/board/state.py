"""Where a run stands: what it does, how far it is, when it will be done, and whether it has been heard of lately."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from sdft.board.history import Record

PATIENCE, OF_THE_END = 120.0, 1800.0
"""Seconds without news, in training and while the weights are written and judged, after which a page says so."""
EARLY = 0.05
"""Share of the steps after which the time of all of them is forecast."""
LONGEST_GAPS = 3
"""Times the longest time without news so far, which may have been a validation, that a page waits."""


def state_of(record: Record, summary: Mapping[str, Any] | None) -> dict[str, Any]:
    """The state of a run, for its page.

    `what`: training, finishing (training is over), finished, stopped, failed, or unknown for a folder that says
    nothing. `left`: seconds of training that are left; null if unknown. `patience`: seconds after `updated` without
    which the run may have died. All times are Unix times.
    """
    done, of = (summary or {}).get("num_steps"), record.start.get("max_steps")
    done = done if isinstance(done, int) else 0
    going: str = "finishing" if record.trained else "training"
    if not record.start:
        going = "finished" if summary else "unknown"
    return {
        "what": record.end or going,
        "step": max(record.step, done) if record.start else done or most_steps(record),
        "of": of if record.start else done or None,
        "left": seconds_left(record) if going == "training" and not record.end else None,
        "patience": patience(record) if record.start and not record.end else None,
        "started": record.first_started,
        "updated": record.updated,
        "reason": record.reason,
        "resume": record.start.get("resume"),
        "starts": record.num_starts,
        "seconds": seconds_of_a_step(record),
    }


def most_steps(record: Record) -> int:
    """The last step of any curve."""
    return max((step for curve in record.curves.values() for step in curve), default=0)


def seconds_of_a_step(record: Record) -> float | None:
    """Seconds of an optimizer step in the second half of what was trained since the start, with all interruptions."""
    points = sorted(record.times.items())
    points = points[len(points) // 2 :] if len(points) > 3 else points[1:]
    if len(points) < 2:
        return None
    (first, since), (last, now) = points[0], points[-1]
    return max(0.0, now - since) / (last - first)


def early_forecast(record: Record) -> dict[str, float] | None:
    """How long training since the start would take at the pace of its first steps: `seconds`, by the first `steps`."""
    points = sorted(record.times.items())
    total = record.start.get("max_steps", 0) - record.start.get("step", 0)
    for step, now in points[1:]:
        done = step - points[0][0]
        if done >= EARLY * total > 0:
            return {"steps": done, "seconds": (now - points[0][1]) / done * total}
    return None


def seconds_trained(record: Record) -> float | None:
    """Seconds from the last start to the last step; None where no step is recorded."""
    if len(record.times) < 2:
        return None
    return record.times[max(record.times)] - record.times[min(record.times)]


def seconds_left(record: Record) -> float | None:
    """Seconds until training is over, at the pace of late."""
    pace = seconds_of_a_step(record)
    return None if pace is None else pace * max(0, record.start["max_steps"] - record.step)


def patience(record: Record) -> float:
    """Seconds to wait for news."""
    if record.trained:
        return OF_THE_END
    times = [time for _, time in sorted(record.times.items())]
    gaps = [later - time for time, later in itertools.pairwise(times)]
    return max(PATIENCE, LONGEST_GAPS * max(gaps, default=0.0))
