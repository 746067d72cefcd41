"""When to stop a run, and which of its weights to keep, by what was measured on its pictures.

Every comparison is a paired test over the pictures (`sdft.evaluation.statistics`), and a limit counts as passed only if
the 95 % interval lies beyond it: what a few pictures cannot tell changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from sdft.evaluation.results import MetricInfo
from sdft.evaluation.statistics import LEVEL, compare
from sdft.evaluation.watching import FIGURES, LOOKS, Values
from sdft.types import Count, Fraction, NonNegative

SETTLED = 0.1
"""Share of the largest learning rate. A fall that is smaller leaves the weights about where they are."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """What was measured on the pictures of one step; step 0 is the base.

    values: figure -> one value for each picture, or for each that is left out.
    strength: at which the adapter was applied.
    rate_to_fall: share of the largest learning rate by which the rate would still fall until the end of the run.
    """

    step: int
    values: Mapping[str, np.ndarray]
    strength: float = 1.0
    rate_to_fall: float = 0.0

    @staticmethod
    def of(step: int, values: Values, strength: float = 1.0, rate_to_fall: float = 0.0) -> Measurement:
        """A measurement, with the values as arrays of floats."""
        arrays = {name: np.asarray(found, dtype=float) for name, found in values.items()}
        return Measurement(step, arrays, strength, rate_to_fall)

    @property
    def means(self) -> dict[str, float]:
        """Figure -> its value."""
        return {name: float(found.mean()) for name, found in self.values.items()}

    @property
    def look(self) -> str | None:
        """The figure of what is learned, if it was measured."""
        return next((name for name in LOOKS if name in self.values), None)

    def interval(self, figure: str) -> tuple[float, float]:
        """The 95 % interval of a figure, by Student's t; infinite for a single value."""
        found = self.values[figure]
        if len(found) < 2:
            return -np.inf, np.inf
        half = float(stats.t(len(found) - 1).ppf(1 - LEVEL / 2) * found.std(ddof=1) / np.sqrt(len(found)))
        return float(found.mean()) - half, float(found.mean()) + half

    def to_json(self) -> dict[str, Any]:
        values = {name: found.tolist() for name, found in self.values.items()}
        return {"step": self.step, **self.means, "rate_to_fall": self.rate_to_fall, "values": values}

    @staticmethod
    def from_json(line: Mapping[str, Any]) -> Measurement:
        return Measurement.of(line["step"], line["values"], rate_to_fall=line.get("rate_to_fall", 0.0))


@dataclass(frozen=True)
class Limits:
    """What a run may cost.

    adherence: least share of the base's prompt adherence. forgetting: largest share of the adherence to other prompts
    that may be lost. novelty: least distance to the nearest training image, where 1 is that between training images.
    """

    adherence: Fraction = 0.7
    forgetting: Fraction = 0.3
    novelty: NonNegative = 0.6

    def passed(self, measured: Measurement, base: Measurement | None = None) -> list[str]:
        """The figures that are beyond their limits, with their whole interval."""
        found = []
        for name, limit in (("adherence", self.adherence), ("forgetting", self.forgetting), ("novelty", self.novelty)):
            if name not in measured.values:
                continue
            low, high = measured.interval(name)
            if FIGURES[name].better == "higher" and name == "novelty" and base is not None:
                limit = min(limit, limit * base.means[name])  # where the base is near already
            if (high < limit) if FIGURES[name].better == "higher" else (low > limit):
                found.append(name)
        return found


def improvement(now: Measurement, before: Measurement, figure: str) -> tuple[float, float]:
    """By how much a figure is better than before, and the p-value of the paired test."""
    sign = 1 if FIGURES[figure].better == "higher" else -1
    a, b = now.values[figure], before.values[figure]
    found = compare(sign * a, sign * b, range(len(a)))
    return (0.0, 1.0) if found is None else (found.difference.value, found.p)


def trend(window: Sequence[Measurement], figure: str) -> tuple[float, float]:
    """By how much a figure became better over several measurements, and the p-value that it did not change.

    A line is fitted to the values of each picture, so that all measurements count, and not only the first and the last;
    the slopes of the pictures are tested.
    """
    sign = 1 if FIGURES[figure].better == "higher" else -1
    steps_T = np.array([one.step for one in window], dtype=float)
    values_TN = np.stack([one.values[figure] for one in window])
    centred_T = steps_T - steps_T.mean()
    slopes_N = sign * centred_T @ values_TN / (centred_T @ centred_T)
    found = compare(slopes_N, np.zeros_like(slopes_N), range(len(slopes_N)))
    return (0.0, 1.0) if found is None else (found.difference.value * float(steps_T[-1] - steps_T[0]), found.p)


@dataclass(frozen=True)
class StoppingRule:
    """Ends a run when a figure is beyond its limit in two measurements in a row, or when no figure became detectably
    better over the last `patience` measurements: of none is the trend significant at the 5 % level, one-sided.

    Where the learning rate will still fall by more than `SETTLED` of its largest value, standing still ends no run: the
    weights settle as the rate falls, and become better again.
    """

    limits: Limits = Limits()
    patience: Count = 6

    def __call__(self, history: Sequence[Measurement]) -> str | None:
        """Why to stop after the last measurement; None to go on. history: the base first."""
        return reason_to_stop(history, self.limits, self.patience)


def reason_to_stop(history: Sequence[Measurement], limits: Limits, patience: int) -> str | None:
    """See `StoppingRule`."""
    if len(history) < 3:
        return None
    base, now = history[0], history[-1]
    if both := [name for name in limits.passed(now, base) if name in limits.passed(history[-2], base)]:
        return " and ".join(f"{told(now, name)}, beyond its limit of {getattr(limits, name):g}" for name in both)
    if len(history) < patience + 2 or now.rate_to_fall > SETTLED:
        return None
    window = history[-1 - patience :]
    shared = [name for name in now.values if all(name in one.values for one in window)]
    trends = [trend(window, name) for name in shared]
    if now.look is None or any(gain > 0 and p < 2 * LEVEL for gain, p in trends):  # two-sided p-values
        return None
    return f"no figure has become better since step {window[0].step} by more than its noise: {told(now, now.look)}"


def told(measured: Measurement, figure: str) -> str:
    """A figure with its interval, as `style gain 0.62 (0.55 to 0.69)`."""
    low, high = measured.interval(figure)
    info: MetricInfo = FIGURES[figure]
    return f"{info.label} {measured.means[figure]:.2f} ({low:.2f} to {high:.2f})"
