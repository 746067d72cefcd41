"""A sweep as a comparison: each job is a subject, and every metric gets a heat map over two varied values.

Reads the folders of a multirun, whatever launched it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from sdft.errors import UserError
from sdft.evaluation.results import Estimate, HeatMap, MetricInfo, Results, SubjectSummary, Value
from sdft.evaluation.subjects import Subject, read_subjects
from sdft.formats.run_folder import SUMMARY

REPEATS = "seed"
"""The config key whose values make repetitions of a job, over which heat maps average."""
TRAINING_METRICS = {
    "style_gain": MetricInfo(
        "style_gain", "style gain", "higher", "Measured after training: 0 is the base model, 1 the target style."
    ),
    "val/eps_mse": MetricInfo("val/eps_mse", "validation loss", "lower", "Error in the noise at the end of training."),
}
"""Values of `summary.json` that are shown beside those of the comparison."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its folder, its command-line overrides, and its summary, empty if it did not finish."""

    folder: Path
    overrides: Mapping[str, str]
    summary: Mapping[str, Any]


def job_subjects(jobs: Sequence[Job]) -> list[Subject]:
    """A subject for each finished job, named by the values that vary, such as `rank 4, lr 0.001`."""
    finished = [job for job in jobs if job.summary]
    if not finished:
        raise UserError(f"sweep: no job has finished (none has a {SUMMARY}); read the logs in their folders")
    keys = dict.fromkeys(key for job in finished for key in job.overrides)
    varied = [key for key in keys if len({job.overrides.get(key) for job in finished}) > 1]
    short = {key: key.rpartition(".")[2].rpartition("/")[2] for key in varied}
    if len(set(short.values())) < len(short):
        short = {key: key for key in varied}
    found = []
    for job in finished:
        values = {short[key]: number(job.overrides[key]) for key in varied if key in job.overrides}
        (subject,) = read_subjects({job.folder.name: str(job.folder)})
        name = ", ".join(f"{key} {value}" for key, value in values.items()) or job.folder.name
        found.append(replace(subject, name=name, varied=values))
    if len({subject.name for subject in found}) < len(found):
        found = [replace(s, name=f"{s.name} ({job.folder.name})") for s, job in zip(found, finished, strict=True)]
    return found


def training_values(jobs: Sequence[Job], subjects: Sequence[Subject]) -> dict[str, dict[str, Estimate]]:
    """The values of `TRAINING_METRICS` in the summary of each subject's run."""
    by_source = {str(job.folder): job.summary for job in jobs}
    summaries = {subject.name: by_source.get(subject.source, {}) for subject in subjects}
    return {
        name: {key: Estimate(float(summary[key])) for key in TRAINING_METRICS if _is_number(summary.get(key))}
        for name, summary in summaries.items()
    }


def heat_maps(
    subjects: Sequence[SubjectSummary], metrics: Sequence[MetricInfo], figures: Mapping[str, Mapping[str, Estimate]]
) -> list[HeatMap]:
    """Each metric over the two values that vary; an empty list unless exactly two vary besides the seed."""
    names = dict.fromkeys(name for subject in subjects for name in subject.varied if name != REPEATS)
    axes = [name for name in names if len({subject.varied.get(name) for subject in subjects if subject.varied}) > 1]
    if len(axes) != 2:
        return []
    row, column = axes
    found = []
    for metric in metrics:
        cells: dict[tuple[Value, Value], list[Estimate]] = defaultdict(list)
        for subject in subjects:
            if row in subject.varied and column in subject.varied and metric.name in figures.get(subject.name, {}):
                cells[subject.varied[row], subject.varied[column]].append(figures[subject.name][metric.name])
        if cells:
            means = {cell: average_repeats(repeats) for cell, repeats in sorted(cells.items(), key=_order)}
            found.append(HeatMap(metric.name, row, column, means))
    return found


def average_repeats(repeats: Sequence[Estimate]) -> Estimate:
    """The mean of the repetitions with its 95 % t-interval; a single job keeps its own interval."""
    if len(repeats) == 1:
        return repeats[0]
    values = np.array([repeat.value for repeat in repeats])
    half_width = stats.t(len(values) - 1).ppf(0.975) * values.std(ddof=1) / np.sqrt(len(values))
    return Estimate(float(values.mean()), float(values.mean() - half_width), float(values.mean() + half_width))


def number(text: str) -> Value:
    """The text as a number, if it is one."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def add_training_values(results: Results, trained: Mapping[str, Mapping[str, Estimate]]) -> Results:
    """The results with the values that training measured as further metrics."""
    if not any(trained.values()):
        return results
    figures = {name: {**own, **trained.get(name, {})} for name, own in results.figures.items()}
    known = [metric for key, metric in TRAINING_METRICS.items() if any(key in own for own in trained.values())]
    metrics = [*results.metrics, *known]
    maps = heat_maps(results.subjects, metrics, figures)
    return replace(results, metrics=metrics, figures=figures, heat_maps=maps)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _order(cell: tuple[tuple[Value, Value], Any]) -> tuple:
    return tuple((isinstance(value, str), value) for value in cell[0])
