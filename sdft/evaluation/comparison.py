"""A comparison from beginning to end: who, what, drawn, measured, judged.

Knows the order of things; what each of them is, is the other files' to know. Must not know config files or pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import MinLen

from sdft.distributed.processes import ProcessInfo
from sdft.errors import UserError
from sdft.evaluation.adherence import load_judge
from sdft.evaluation.gallery import VERSIONS, Gallery, PictureFiles
from sdft.evaluation.grid import Axes, Axis, Cell, Size, cells, options_of, read_prompts, size_in_words
from sdft.evaluation.metrics.measure import LEAST_REFERENCES, Drawn, Lab, Measure, read_source, scalars
from sdft.evaluation.models import Models
from sdft.evaluation.results import Compared, Estimate, Picture, Results, Value, Verdict
from sdft.evaluation.statistics import LEAST, LEVEL, Difference, compare, estimate, holm
from sdft.evaluation.subjects import FINAL, Source, Subject, read_subjects
from sdft.evaluation.sweeps import heat_maps
from sdft.evaluation.tradeoff import weigh
from sdft.models.load import NANO
from sdft.models.sdxl import SDXL
from sdft.sampling.samplers import Sampler
from sdft.types import Count


class Comparison:
    """Every subject draws every prompt from the same seeds, at every value of every axis.

    subjects: name -> `nano`, a hub id, a diffusers folder, a single-file checkpoint, a run folder of `train.py`, a
        LoRA file, `{lora: RUN_OR_FILE, scale: 0.7}`, or a list of a model and LoRAs on it.
    sweep: instead of subjects, the folder of a Hydra multirun: its jobs, and the base.
    model: loads the base model; called with `weights`, another one.
    prompts: what is drawn: a list, or a text file with one on each line.
    sampler: how it is drawn.
    axes: what is varied besides.
    compete: axes whose values are compared like subjects, such as [scale]; the others make pairs.
    seeds: pictures of each prompt; seed 0, 1, ... of a prompt is the same noise for every subject.
    size: side of the pictures in pixels, or [height, width].
    baseline: the subject that the others are tested against; the first where not said.
    judge: folder or hub id of a CLIP that metrics see through; `nano` is the shipped one.
    reference: pictures of the look that is wanted: a folder, or `toy/dreamy`.
    training: what was learned from, to find copies: a folder, or `toy/dreamy/train`.
    held_out: captioned pictures for the loss: a folder, or `toy/dreamy/validation`.
    metrics: what is measured. One whose needs are not given is left out, and said.
    front: what is traded: the first two of these metrics that were measured, what to keep before what to gain.
    logger: Weights & Biases, where its table is wanted.
    name: of the comparison, on its page and in W&B.
    run_dir: where everything is written; with the same folder, only what is missing is drawn.
    """

    def __init__(
        self,
        model: Callable[..., SDXL],
        prompts: Annotated[Sequence[str], MinLen(1)] | str,
        sampler: Sampler,
        run_dir: str,
        subjects: Mapping[str, Source] | None = None,
        sweep: str | None = None,
        axes: Axes | None = None,
        compete: Sequence[Axis] = (),
        seeds: Count = 1,
        size: Size = 64,
        baseline: str | None = None,
        judge: str | None = None,
        reference: str | None = None,
        training: str | None = None,
        held_out: str | None = None,
        metrics: Mapping[str, Measure] | None = None,
        front: Sequence[str] = ("adherence", "style_distance"),
        logger: Mapping[str, Any] | None = None,
        name: str = "comparison",
    ):
        if (subjects is None) == (sweep is None):
            raise UserError("say what to compare: subjects='{base: nano, mine: RUN_FOLDER}', or sweep=MULTIRUN_DIR")
        self.subjects, self.sweep = subjects, None if sweep is None else Path(sweep).expanduser()
        self.model, self.prompts, self.sampler, self.run_dir = model, read_prompts(prompts), sampler, Path(run_dir)
        self.axes, self.compete, self.seeds, self.size = axes or Axes(), list(compete), seeds, size
        self.baseline, self.judge, self.front, self.name = baseline, judge, list(front), name
        self.metrics, self.logger = dict(metrics or {}), dict(logger or {})
        self.given = {"reference": reference, "training": training, "held_out": held_out}

    def read_subjects(self) -> list[Subject]:
        """Those that the user named."""
        found = read_subjects(self.subjects or {})
        if self.baseline is not None and self.baseline not in [subject.name for subject in found]:
            raise UserError(f"baseline={self.baseline}: is none of the subjects {[s.name for s in found]}")
        return found

    def cells(self, subjects: Sequence[Subject]) -> list[Cell]:
        """The grid."""
        return cells(subjects, self.prompts, range(self.seeds), self.sampler, self.size, self.axes, self.compete)

    def open_lab(self) -> Lab:
        """What metrics compare with, but for the baseline's pictures. Raises UserError for what is not there."""
        side = self.size if isinstance(self.size, int) else max(self.size)
        read = {
            key: read_source(key, name, side, LEAST_REFERENCES if key == "reference" else 1)
            for key, name in self.given.items()
        }
        judge = None if self.judge is None else load_judge(str(NANO / "clip") if self.judge == "nano" else self.judge)
        return Lab(judge, read["reference"], read["training"], read["held_out"])

    def measured(self, lab: Lab) -> tuple[list[Measure], list[str]]:
        """The metrics whose needs are met, and what is said of the others."""
        missing = {name: lab.lacks(measure.needs) for name, measure in self.metrics.items()}
        told = [f"{name} ({', '.join(f'{need}=null' for need in needs)})" for name, needs in missing.items() if needs]
        return [measure for name, measure in self.metrics.items() if not missing[name]], told


def draw(
    comparison: Comparison, subjects: Sequence[Subject], models: Models, place: ProcessInfo = ProcessInfo()
) -> list[Drawn]:
    """All pictures, by contestant; those of other ranks may still be missing, except on rank 0."""
    wanted = comparison.cells(subjects)
    precision: Literal["bf16", "fp32"] = "bf16" if models.device.type == "cuda" else "fp32"
    gallery = Gallery(comparison.run_dir / "pictures", models, precision, comparison.sampler.batch_size)
    gallery.fill(wanted, place)
    found: dict[str, list[Cell]] = {}
    for cell in wanted:
        found.setdefault(cell.contestant, []).append(cell)
    return [
        Drawn(
            name,
            own,
            PictureFiles([gallery.path(cell) for cell in own]),
            partial(models.open, own[0].subject, own[0].scale, own[0].step),
        )
        for name, own in found.items()
    ]


def measure(
    comparison: Comparison, drawn: Sequence[Drawn], baseline: str, lab: Lab, measures: Sequence[Measure]
) -> Results:
    """Figures of every picture and subject, and how each differs from the baseline, one of the contestants."""
    base = next(one for one in drawn if one.name == baseline)
    lab = replace(lab, base=base)
    pictures: list[Picture] = []
    figures: dict[str, dict[str, Estimate]] = {}
    of_pictures: dict[str, dict[str, np.ndarray]] = {}
    for one in drawn:
        found = {m.metric.name: m(one, lab) for m in measures}
        of_pictures[one.name] = {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
        whole = {
            name: value if isinstance(value, Estimate) else estimate(value, one.units)
            for name, value in found.items()
            if value is not None
        }
        figures[one.name] = {name: value for name, value in whole.items() if value is not None}
        pictures += [_picture(comparison, one, index, of_pictures[one.name]) for index in range(len(one.cells))]
    metrics = [m.metric for m in measures]
    compared = [_compared(one) for one in drawn]
    axes: dict[str, list[Value]] = {}
    for one in drawn:
        for cell in one.cells:
            for name, value in cell.axes.items():
                axes.setdefault(name, [])
                axes[name] += [value] if value not in axes[name] else []
    return Results(
        title=f"{comparison.name}: " + " · ".join(dict.fromkeys(one.cells[0].subject.name for one in drawn)),
        settings=_settings(comparison),
        axes=axes,
        subjects=compared,
        metrics=metrics,
        pictures=pictures,
        figures=figures,
        verdicts=[v for m in metrics for v in verdicts(m, drawn, base, of_pictures)],
        heat_maps=heat_maps(compared, metrics, figures),
    )


def verdicts(metric, drawn: Sequence[Drawn], base: Drawn, of_pictures: Mapping[str, Mapping]) -> list[Verdict]:
    """Every subject against the baseline in one metric, Holm's correction over the subjects."""
    others = [one for one in drawn if one is not base and metric.name in of_pictures[one.name]]
    if metric.name not in of_pictures[base.name]:
        return []
    base_values = dict(zip((cell.pair for cell in base.cells), of_pictures[base.name][metric.name], strict=True))
    found: list[tuple[Drawn, Difference, int]] = []
    for one in others:
        partners = np.array([base_values.get(cell.pair, np.nan) for cell in one.cells])
        own = of_pictures[one.name][metric.name]
        if difference := compare(own, partners, one.units, len(others)):
            found.append((one, difference, int((~np.isnan(own - partners)).sum())))
    ps = holm([difference.p for _, difference, _ in found]) if found else []
    return [
        Verdict(
            subject=one.name,
            baseline=base.name,
            metric=metric.name,
            difference=d.difference,
            p=p,
            effect=d.effect,
            detectable=d.detectable,
            num_pairs=num_pairs,
            sentence=sentence(one, base.name, metric, d, p, num_pairs),
        )
        for (one, d, num_pairs), p in zip(found, ps, strict=True)
    ]


def sentence(one: Drawn, baseline: str, metric, d: Difference, p: float, num_pairs: int) -> str:
    """A verdict in words, with what it rests on."""
    num_prompts, pairs = len(set(one.prompts)), f"{num_pairs} pair{'s' if num_pairs > 1 else ''}"
    where = f"over {pairs} of {num_prompts} prompt{'s' if num_prompts > 1 else ''}"
    if d.num_units != num_prompts:
        where = f"{where}, which speaks of these prompts only"
    if np.isinf(d.detectable):
        remedy = f"draw at least {LEAST} (seeds= or prompts=)"
        return f"{one.name}: {pairs} cannot show a difference in {metric.label}; {remedy}."
    if d.detectable == 0 and d.difference.value == 0:
        return f"{one.name}: {metric.label} is the same as {baseline}'s in all {pairs}."
    if p >= LEVEL:
        return (
            f"{one.name}: no detectable difference from {baseline} in {metric.label} {where} (p = {p:.2g}); "
            f"one of {d.detectable:.2g} would have been seen."
        )
    way = "higher" if d.difference.value > 0 else "lower"
    good = "" if metric.better is None else ", which is better" if metric.better == way else ", which is worse"
    interval = ""
    if d.difference.low is not None and d.difference.high is not None:
        interval = f" (95 %: {d.difference.low:.2g} to {d.difference.high:.2g})"
    return (
        f"{one.name}: {metric.label} is {abs(d.difference.value):.2g} {way} than {baseline}'s{good}{interval}, "
        f"{where} (p = {p:.2g}, {abs(d.effect):.1f} standard deviations)."
    )


def weighed(comparison: Comparison, results: Results, baseline: str) -> tuple[Any, str]:
    """The trade-off of the first two metrics of `front` that were measured, or why there is none."""
    known = {m.name: m for m in results.metrics if any(m.name in own for own in results.figures.values())}
    chosen = [known[name] for name in comparison.front if name in known and known[name].better is not None]
    if len(chosen) < 2:
        return None, f"no recommendation: needs two of {', '.join(comparison.front)}; set judge= and reference="
    found = weigh(results.figures, chosen[0], chosen[1], results.verdicts, baseline)
    return found, "" if found else "no recommendation: fewer than two subjects have both figures"


def _picture(comparison: Comparison, one: Drawn, index: int, figures: Mapping[str, np.ndarray]) -> Picture:
    cell, setting = one.cells[index], one.cells[index].setting
    settings = options_of(setting.drawn_by(batch_size=1)) | {
        "size": size_in_words(setting.size_hw),
        "prompt": setting.prompt,
        "seed": setting.seed,
    }
    if cell.subject.loras:
        settings["scale"] = cell.scale
    if cell.step != FINAL:
        settings["step"] = cell.step
    assert isinstance(one.images, PictureFiles), "the gallery keeps what it draws"
    relative = one.images.paths[index].relative_to(comparison.run_dir).as_posix()
    return Picture(one.name, cell.axes, relative, settings, scalars(figures, index))


def _compared(one: Drawn) -> Compared:
    cell = one.cells[0]
    return Compared(
        one.name, cell.subject.kind, cell.subject.source, {**cell.subject.varied, **cell.varied}, cell.subject.cost
    )


def _settings(comparison: Comparison) -> dict[str, Value]:
    """What all pictures share."""
    whole = options_of(comparison.sampler) | {"size": size_in_words(comparison.size)}
    return {name: value for name, value in whole.items() if name not in comparison.axes.values} | VERSIONS
