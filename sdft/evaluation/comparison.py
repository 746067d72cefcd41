"""A comparison from subjects to results: which images are needed, generate, measure, test, recommend.

Holds the order of the steps; each step is a function of another file. Independent of config files and of the page.
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
from sdft.evaluation.clip_judge import load_judge
from sdft.evaluation.grid import Axes, Axis, GridCell, Size, build_grid, options_of, read_prompts, size_text
from sdft.evaluation.image_cache import VERSIONS, ImageCache, ImageFiles
from sdft.evaluation.metrics.protocol import (
    MIN_REFERENCES,
    GeneratedImages,
    Metric,
    MetricInputs,
    read_source,
    scalars,
)
from sdft.evaluation.results import Estimate, ImageResult, Results, SubjectSummary, Tradeoff, Value
from sdft.evaluation.statistics import estimate
from sdft.evaluation.subject_loader import SubjectLoader
from sdft.evaluation.subjects import FINAL, Source, Subject, read_subjects
from sdft.evaluation.sweeps import heat_maps
from sdft.evaluation.tradeoff import find_tradeoff
from sdft.evaluation.verdicts import verdicts
from sdft.protocols import DiffusionModel
from sdft.sampling.samplers import Sampler
from sdft.types import NumScenes


class Comparison:
    """Every subject (a model, or a model with LoRAs) generates every prompt from the same seeds, at every axis value.

    subjects: name -> `nano`, a hub id, a diffusers folder, a single-file checkpoint, a run folder of `train.py`, a
        LoRA file, `{lora: RUN_OR_FILE, scale: 0.7}`, or a list of a model and LoRAs on it.
    sweep: instead of subjects, the folder of a Hydra multirun: its jobs and the base model are the subjects.
    model: loads the base model; called with `weights`, another one.
    prompts: a list, or a text file with one prompt on each line.
    sampler: the sampler and its options, where no axis varies them.
    axes: what is varied besides prompt and seed.
    compete: axes whose values become subjects of their own, such as [scale]: they are tested against the baseline. The
        images of all other axes form pairs with the same value.
    seeds: number of images per prompt; seed 0, 1, ... of a prompt is the same noise for every subject.
    size: side of the images in pixels, or [height, width].
    baseline: the subject that the others are tested against; by default the first.
    judge: folder or hub id of the CLIP model that metrics use; `nano` is the one in this package.
    reference: images of the target style: a folder, or `toy/dreamy`.
    training: the images of the training set, to find copies: a folder, or `toy/dreamy/train`.
    held_out: captioned images for the validation loss: a folder, or `toy/dreamy/validation`.
    metrics: name -> metric. One whose inputs are not given is left out and reported.
    front: metrics of the trade-off. The first two that were measured are used: what to keep, then what to gain.
    logger: W&B, if the tables should be logged there.
    name: of the comparison, on its page and in W&B.
    trust: packages whose classes the configs of run folders may name, besides those of sdft.
    run_dir: folder for all output; with the same folder, only missing images are generated.
    """

    def __init__(
        self,
        model: Callable[..., DiffusionModel],
        prompts: Annotated[Sequence[str], MinLen(1)] | str,
        sampler: Sampler,
        run_dir: str,
        subjects: Mapping[str, Source] | None = None,
        sweep: str | None = None,
        axes: Axes | None = None,
        compete: Sequence[Axis] = (),
        seeds: NumScenes = 1,
        size: Size = 64,
        baseline: str | None = None,
        judge: str | None = None,
        reference: str | None = None,
        training: str | None = None,
        held_out: str | None = None,
        metrics: Mapping[str, Metric] | None = None,
        front: Sequence[str] = ("adherence", "style_distance"),
        logger: Mapping[str, Any] | None = None,
        name: str = "comparison",
        trust: str | Sequence[str] = (),
    ):
        if (subjects is None) == (sweep is None):
            raise UserError("say what to compare: subjects='{base: nano, mine: RUN_FOLDER}', or sweep=MULTIRUN_DIR")
        self.subjects, self.sweep = subjects, None if sweep is None else Path(sweep).expanduser()
        self.model, self.prompts, self.sampler, self.run_dir = model, read_prompts(prompts), sampler, Path(run_dir)
        self.axes, self.compete, self.seeds, self.size = axes or Axes(), list(compete), seeds, size
        self.baseline, self.judge, self.front, self.name = baseline, judge, list(front), name
        self.metrics, self.logger = dict(metrics or {}), dict(logger or {})
        self.trust = [trust] if isinstance(trust, str) else list(trust)
        self.given = {"reference": reference, "training": training, "held_out": held_out}

    def read_subjects(self) -> list[Subject]:
        """The subjects that the user named. Raises UserError for one that cannot be opened."""
        found = read_subjects(self.subjects or {})
        if self.baseline is not None and self.baseline not in [subject.name for subject in found]:
            raise UserError(f"baseline={self.baseline}: is none of the subjects {[s.name for s in found]}")
        return found

    def build_grid(self, subjects: Sequence[Subject]) -> list[GridCell]:
        """One cell for every image of the comparison."""
        return build_grid(subjects, self.prompts, range(self.seeds), self.sampler, self.size, self.axes, self.compete)

    def read_inputs(self) -> MetricInputs:
        """The inputs of metrics, without the baseline's images. Raises UserError for one that does not exist."""
        side = self.size if isinstance(self.size, int) else max(self.size)
        read = {
            key: read_source(key, name, side, MIN_REFERENCES if key == "reference" else 1)
            for key, name in self.given.items()
        }
        judge = None if self.judge is None else load_judge(self.judge)
        return MetricInputs(judge, read["reference"], read["training"], read["held_out"])

    def available_metrics(self, inputs: MetricInputs) -> tuple[list[Metric], list[str]]:
        """The metrics whose needs are met, and for each other one its name and what is missing."""
        missing = {name: inputs.missing(metric.needs) for name, metric in self.metrics.items()}
        left_out = [f"{name} ({'=null, '.join(needs)}=null)" for name, needs in missing.items() if needs]
        return [metric for name, metric in self.metrics.items() if not missing[name]], left_out


def generate_images(
    comparison: Comparison, subjects: Sequence[Subject], loader: SubjectLoader, process: ProcessInfo = ProcessInfo()
) -> list[GeneratedImages]:
    """All images, by subject variant; those of other ranks may still be missing, except on rank 0."""
    grid = comparison.build_grid(subjects)
    precision: Literal["bf16", "fp32"] = "bf16" if loader.device.type == "cuda" else "fp32"
    cache = ImageCache(comparison.run_dir / "pictures", loader, precision, comparison.sampler.batch_size)
    cache.fill(grid, process)
    by_variant: dict[str, list[GridCell]] = {}
    for cell in grid:
        by_variant.setdefault(cell.variant, []).append(cell)
    return [
        GeneratedImages(
            name,
            cells,
            ImageFiles([cache.path(cell) for cell in cells]),
            partial(loader.open, cells[0].subject, cells[0].scale, cells[0].step, cells[0].width),
        )
        for name, cells in by_variant.items()
    ]


def measure(
    comparison: Comparison,
    generated: Sequence[GeneratedImages],
    baseline: str,
    inputs: MetricInputs,
    metrics: Sequence[Metric],
) -> Results:
    """Values of every image and subject, and the difference of each subject from the one called `baseline`."""
    base = next(one for one in generated if one.name == baseline)
    inputs = replace(inputs, baseline=base)
    images: list[ImageResult] = []
    by_subject: dict[str, dict[str, Estimate]] = {}
    by_image: dict[str, dict[str, np.ndarray]] = {}
    for one in generated:
        values = {metric.info.name: _checked(metric(one, inputs), metric, one) for metric in metrics}
        by_image[one.name] = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
        estimates = {
            name: estimate(value, one.units) if isinstance(value, np.ndarray) else value
            for name, value in values.items()
        }
        by_subject[one.name] = {name: value for name, value in estimates.items() if value is not None}
        images += [_image_result(comparison, one, index, by_image[one.name]) for index in range(len(one.cells))]
    infos = [metric.info for metric in metrics]
    summaries = [_summary(one) for one in generated]
    return Results(
        title=f"{comparison.name}: " + " · ".join(dict.fromkeys(one.cells[0].subject.name for one in generated)),
        settings=_shared_settings(comparison),
        axes=_axis_values(generated),
        subjects=summaries,
        metrics=infos,
        pictures=images,
        figures=by_subject,
        verdicts=[verdict for info in infos for verdict in verdicts(info, generated, base, by_image)],
        heat_maps=heat_maps(summaries, infos, by_subject),
    )


def recommend(comparison: Comparison, results: Results, baseline: str) -> tuple[Tradeoff | None, str]:
    """The trade-off of the first two metrics of `front` that were measured, or the reason why there is none."""
    measured = {m.name: m for m in results.metrics if any(m.name in own for own in results.figures.values())}
    chosen = [measured[name] for name in comparison.front if name in measured and measured[name].better is not None]
    if len(chosen) < 2:
        return None, f"no recommendation: needs two of {', '.join(comparison.front)}; set judge= and reference="
    found = find_tradeoff(results.figures, chosen[0], chosen[1], results.verdicts, baseline)
    return found, "" if found else "no recommendation: fewer than two subjects have both metrics"


def _checked(value: Any, metric: Metric, one: GeneratedImages) -> np.ndarray | Estimate | None:
    """What a metric returned. Raises UserError for anything that does not fit its images."""
    if value is None or isinstance(value, Estimate):
        return value
    if not isinstance(value, np.ndarray):
        returned = type(value).__name__
    elif value.shape != (len(one.cells),):
        returned = f"an array of shape {value.shape}"
    else:
        return value
    raise UserError(
        f"metrics.{metric.info.name} ({type(metric).__name__}) returned {returned} for {len(one.cells)} images; "
        f"return an array of shape ({len(one.cells)},), an Estimate or None"
    )


def _image_result(
    comparison: Comparison, one: GeneratedImages, index: int, values: Mapping[str, np.ndarray]
) -> ImageResult:
    cell = one.cells[index]
    settings = options_of(cell.settings.to_sampler(batch_size=1)) | {
        "size": size_text(cell.settings.size_hw),
        "prompt": cell.settings.prompt,
        "seed": cell.settings.seed,
    }
    if cell.subject.loras:
        settings["scale"] = cell.scale
    if cell.step != FINAL:
        settings["step"] = cell.step
    if cell.width is not None:
        settings["width"] = cell.width
    assert isinstance(one.images, ImageFiles), "the results hold paths of images"
    relative = one.images.paths[index].relative_to(comparison.run_dir).as_posix()
    return ImageResult(one.name, cell.axes, relative, settings, scalars(values, index))


def _summary(one: GeneratedImages) -> SubjectSummary:
    cell = one.cells[0]
    varied = {**cell.subject.varied, **cell.varied}
    return SubjectSummary(one.name, cell.subject.kind, cell.subject.source, varied, cell.subject.cost)


def _axis_values(generated: Sequence[GeneratedImages]) -> dict[str, list[Value]]:
    """The values of each axis, in the order of the grid."""
    values: dict[str, dict[Value, None]] = {}
    for one in generated:
        for cell in one.cells:
            for name, value in cell.axes.items():
                values.setdefault(name, {})[value] = None
    return {name: list(ordered) for name, ordered in values.items()}


def _shared_settings(comparison: Comparison) -> dict[str, Value]:
    """The settings that all images have in common, and the versions of the libraries."""
    settings = options_of(comparison.sampler) | {"size": size_text(comparison.size)}
    return {name: value for name, value in settings.items() if name not in comparison.axes.values} | VERSIONS
