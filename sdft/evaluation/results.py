"""What a comparison found, as plain data: pictures with their settings and figures, estimates, verdicts.

The one thing that drawing and measuring hand to tables, plots and the page. Knows neither models nor HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Value = str | int | float
"""Of an axis: a sampler's name, a seed, a guidance scale."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, which is None where one number is all there is."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Metric:
    """What a figure means. `better` is None where neither direction is: contrast is a matter of taste."""

    name: str
    label: str
    better: Literal["higher", "lower"] | None
    meaning: str
    """One plain sentence, shown beside the figure."""


@dataclass(frozen=True)
class Compared:
    """A subject as the reader knows it.

    varied: what tells it from the others in a sweep, such as rank and rate.
    cost: what it took, where known: seconds of training, parameters, bytes.
    """

    name: str
    kind: str
    source: str
    varied: Mapping[str, Value] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """One picture of the grid.

    axes: where it stands in the grid, without the subject: prompt, seed, sampler, cfg, steps ...
    path: of the PNG, relative to the page.
    settings: everything it was made with, to make it again.
    figures: metric name -> what was measured on this picture alone.
    """

    subject: str
    axes: Mapping[str, Value]
    path: str
    settings: Mapping[str, Value]
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """How a subject differs from the baseline in one metric, over pairs of the same prompt and seed.

    difference: subject minus baseline. p: after Holm's correction. effect: standardised difference.
    detectable: the smallest difference that this many pairs would have shown (80 % power, 5 % level).
    sentence: the same in words; says "no detectable difference" where that is so.
    """

    subject: str
    baseline: str
    metric: str
    difference: Estimate
    p: float
    effect: float
    detectable: float
    num_pairs: int
    sentence: str


@dataclass(frozen=True)
class Tradeoff:
    """Two metrics against each other, the subjects that no other beats in both, and the one to keep."""

    x: str
    y: str
    front: Sequence[str]
    recommended: str
    reason: str


@dataclass(frozen=True)
class HeatMap:
    """A metric over two varied values of a sweep; cell (row, column) is a mean over repeats with its interval."""

    metric: str
    row_name: str
    column_name: str
    cells: Mapping[tuple[Value, Value], Estimate]


@dataclass(frozen=True)
class Results:
    """All of it. `figures[subject][metric]` is the subject's estimate over its pictures."""

    title: str
    settings: Mapping[str, Value]
    """What all pictures share."""
    axes: Mapping[str, Sequence[Value]]
    """Each axis of the grid with its values, in order; without the subject."""
    subjects: Sequence[Compared]
    metrics: Sequence[Metric]
    pictures: Sequence[Picture]
    figures: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    verdicts: Sequence[Verdict] = ()
    tradeoff: Tradeoff | None = None
    heat_maps: Sequence[HeatMap] = ()
