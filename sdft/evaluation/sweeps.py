"""A sweep as a comparison: each job a subject with what it varied and cost, and maps of every metric over two values.

Knows folders of jobs and figures. Must not know who swept.
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
from sdft.evaluation.results import Compared, Estimate, HeatMap, Metric, Results, Value
from sdft.evaluation.subjects import Subject, read_subjects
from sdft.formats.run_folder import SUMMARY

REPEATS = "seed"
"""The value that makes repeats of one job rather than other jobs."""
TRAINED = {
    "style_gain": Metric("style_gain", "style gain", "higher", "As training measured it: 0 is the base, 1 the look."),
    "val/eps_mse": Metric("val/eps_mse", "validation loss", "lower", "Error in the noise at the end of training."),
}


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its folder, what was said to it, and its summary, empty where it did not finish."""

    folder: Path
    said: Mapping[str, str]
    summary: Mapping[str, Any]


def subjects_of(jobs: Sequence[Job]) -> list[Subject]:
    """A subject for each finished job, named by what it varied."""
    finished = [job for job in jobs if job.summary]
    if not finished:
        raise UserError(f"sweep: no job has finished (none has a {SUMMARY}); look at the folders of the jobs")
    keys = dict.fromkeys(key for job in finished for key in job.said)
    varied = [key for key in keys if len({job.said.get(key) for job in finished}) > 1]
    short = {key: key.rpartition(".")[2].rpartition("/")[2] for key in varied}
    if len(set(short.values())) < len(short):
        short = {key: key for key in varied}
    found = []
    for job in finished:
        values = {short[key]: number(job.said[key]) for key in varied if key in job.said}
        (subject,) = read_subjects({job.folder.name: str(job.folder)})
        name = ", ".join(f"{key} {value}" for key, value in values.items()) or job.folder.name
        found.append(replace(subject, name=name, varied=values))
    if len({subject.name for subject in found}) < len(found):
        found = [replace(s, name=f"{s.name} ({job.folder.name})") for s, job in zip(found, finished, strict=True)]
    return found


def trained_figures(jobs: Sequence[Job], subjects: Sequence[Subject]) -> dict[str, dict[str, Estimate]]:
    """What training measured of each subject."""
    by_source = {str(job.folder): job.summary for job in jobs}
    told = {subject.name: by_source.get(subject.source, {}) for subject in subjects}
    return {
        name: {key: Estimate(float(summary[key])) for key in TRAINED if isinstance(summary.get(key), int | float)}
        for name, summary in told.items()
    }


def heat_maps(
    subjects: Sequence[Compared], metrics: Sequence[Metric], figures: Mapping[str, Mapping[str, Estimate]]
) -> list[HeatMap]:
    """Each metric over the two values that vary; nothing where fewer or more than two do, repeats aside."""
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
            means = {cell: over_repeats(repeats) for cell, repeats in sorted(cells.items(), key=_order)}
            found.append(HeatMap(metric.name, row, column, means))
    return found


def over_repeats(repeats: Sequence[Estimate]) -> Estimate:
    """The mean of repeats and, from their own variance, its interval; a single job keeps its own."""
    if len(repeats) == 1:
        return repeats[0]
    values = np.array([repeat.value for repeat in repeats])
    reach = stats.t(len(values) - 1).ppf(0.975) * values.std(ddof=1) / np.sqrt(len(values))
    return Estimate(float(values.mean()), float(values.mean() - reach), float(values.mean() + reach))


def number(text: str) -> Value:
    """The number that a text is, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def with_trained(results: Results, trained: Mapping[str, Mapping[str, Estimate]]) -> Results:
    """The results with what training measured beside what was measured now."""
    if not any(trained.values()):
        return results
    figures = {name: {**own, **trained.get(name, {})} for name, own in results.figures.items()}
    there = [metric for key, metric in TRAINED.items() if any(key in own for own in trained.values())]
    metrics = [*results.metrics, *there]
    maps = heat_maps(results.subjects, metrics, figures)
    return replace(results, metrics=metrics, figures=figures, heat_maps=maps)


def _order(cell: tuple[tuple[Value, Value], Any]) -> tuple:
    return tuple((isinstance(value, str), value) for value in cell[0])
