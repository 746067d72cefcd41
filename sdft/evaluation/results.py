"""The results of a comparison as plain data: images with their settings and values, estimates, verdicts.

Tables, charts and the page are made from these alone. The field names are the keys of `results.json`: in them, a
`figure` is the value of a metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Value = str | int | float
"""A value of an axis: a sampler's name, a seed, a guidance scale."""


@dataclass(frozen=True)
class Estimate:
    """The value of a metric with its 95 % interval, which is None if there is only one number."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class MetricInfo:
    """The description of a metric.

    name: key in tables and in `results.json`. label: name for readers.
    better: the better direction; None if there is none, as for contrast.
    meaning: one plain sentence, shown beside the values.
    """

    name: str
    label: str
    better: Literal["higher", "lower"] | None
    meaning: str


@dataclass(frozen=True)
class SubjectSummary:
    """What readers see of a subject: its name, its kind (`model`, `LoRA`) and its source, as the user wrote it.

    varied: the values that distinguish it from the others, such as the rank in a sweep.
    cost: if known, seconds of training, number of trained parameters, bytes of the file.
    """

    name: str
    kind: str
    source: str
    varied: Mapping[str, Value] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageResult:
    """One image of the grid.

    axes: its position in the grid, without the subject: prompt, seed, sampler, cfg, steps ...
    path: of the PNG, relative to the page.
    settings: everything that is needed to generate it again.
    figures: metric name -> value of this image.
    """

    subject: str
    axes: Mapping[str, Value]
    path: str
    settings: Mapping[str, Value]
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """The tested difference of a subject from the baseline in one metric, over pairs of the same prompt and seed.

    difference: subject minus baseline. p: after Holm's correction. effect: difference in standard deviations.
    detectable: the smallest difference that this number of pairs can detect (80 % power, 5 % level).
    sentence: the result in words, such as "no detectable difference".
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
    """The trade-off of two metrics: the subjects on the Pareto front, the one to keep, and the reason."""

    x: str
    y: str
    front: Sequence[str]
    recommended: str
    reason: str


@dataclass(frozen=True)
class Headline:
    """The result in one sentence. detail: the numbers behind it, or what was not measured."""

    sentence: str
    detail: str = ""


@dataclass(frozen=True)
class HeatMap:
    """A metric over two varied values of a sweep; cell (row, column) is the mean over repetitions with its interval."""

    metric: str
    row_name: str
    column_name: str
    cells: Mapping[tuple[Value, Value], Estimate]


@dataclass(frozen=True)
class Results:
    """All results. `figures[subject][metric]` is the estimate of a metric over the images of a subject."""

    title: str
    settings: Mapping[str, Value]
    """The settings that all images have in common."""
    axes: Mapping[str, Sequence[Value]]
    """Each axis of the grid with its values in order, without the subject."""
    subjects: Sequence[SubjectSummary]
    metrics: Sequence[MetricInfo]
    pictures: Sequence[ImageResult]
    figures: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    verdicts: Sequence[Verdict] = ()
    tradeoff: Tradeoff | None = None
    heat_maps: Sequence[HeatMap] = ()
    headline: Headline | None = None
