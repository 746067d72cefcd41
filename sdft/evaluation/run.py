"""One comparison, from config to images, metrics and `report.html`: what `eval.py` and the Python API call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from sdft.config.check import check
from sdft.config.command import build
from sdft.config.keys import ConfigError
from sdft.config.trust import as_packages, read_config
from sdft.distributed.processes import ProcessInfo
from sdft.errors import UserError
from sdft.evaluation.comparison import Comparison, generate_images, measure, recommend
from sdft.evaluation.headline import headline
from sdft.evaluation.page.write import write_page
from sdft.evaluation.results import Results
from sdft.evaluation.statistics import LEVEL
from sdft.evaluation.subject_loader import SubjectLoader
from sdft.evaluation.subjects import Subject
from sdft.evaluation.sweeps import Job, add_training_values, job_subjects, training_values
from sdft.evaluation.tables import terminal_table, write_contact_sheet, write_tables
from sdft.merging.run import start_from_merge
from sdft.protocols import DiffusionModel, Objective, Tuning
from sdft.training.sweep import jobs_of

PARTS_OF_A_RUN = ("model", "objective", "tuning")
"""What a run's config must have, so that its checkpoints can be opened."""
Report = Callable[[str], Any]
"""Receives the lines that a command prints."""


@dataclass(frozen=True)
class CompareResult:
    """A finished comparison.

    results: images, metrics and tests of significance, as plain data. run_dir: its folder.
    written: the report, the contact sheet, the tables and the folder of images.
    """

    results: Results
    run_dir: Path
    written: Sequence[Path]

    @property
    def images(self) -> dict[str, list[Image.Image]]:
        """Subject -> its images, in the order of `results.pictures`."""
        found: dict[str, list[Image.Image]] = {}
        for picture in self.results.pictures:
            with Image.open(self.run_dir / picture.path) as image:
                found.setdefault(picture.subject, []).append(image.convert("RGB"))
        return found

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Subject -> metric -> value over its images; intervals are in `results.figures`."""
        return {
            subject: {name: estimate.value for name, estimate in own.items()}
            for subject, own in self.results.figures.items()
        }


def compare(cfg: DictConfig, report: Report) -> CompareResult | None:
    """Run the comparison that a checked config describes; None on all processes but the first."""
    place = ProcessInfo.current()
    cfg.model = start_from_merge(cfg.model, as_packages(cfg.get("trust")))
    comparison = build(cfg)
    # The cheap parts first: a wrong path is reported before any weights are read.
    jobs = read_jobs(comparison.sweep, report) if comparison.sweep else []
    subjects = sweep_subjects(cfg, jobs) if comparison.sweep else comparison.read_subjects()
    wanted = comparison.build_grid(subjects)
    baseline = next(c.variant for c in wanted if c.subject.name == (comparison.baseline or subjects[0].name))
    inputs = comparison.read_inputs()
    measures, left_out = comparison.available_metrics(inputs)
    of_runs = partial(rebuild, trust=comparison.trust)
    models = SubjectLoader(comparison.model, cfg.model.get("weights"), find_device(), of_runs)
    for subject in subjects:
        models.check(subject)
    generated = generate_images(comparison, subjects, models, place)
    if place.rank > 0:
        return None
    results = measure(comparison, generated, baseline, inputs, measures)
    if jobs:
        results = add_training_values(results, training_values(jobs, subjects))
    tradeoff, why_not = recommend(comparison, results, baseline)
    results = replace(results, tradeoff=tradeoff)
    results = replace(results, headline=headline(results, baseline, comparison.front))
    written = write(comparison, results)
    for line in report_lines(results, comparison.front, written, left_out, why_not):
        report(line)
    return CompareResult(results, comparison.run_dir, written)


def find_device() -> torch.device:
    """This process's own accelerator, where there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))))


def read_jobs(sweep_dir: Path, report: Report) -> list[Job]:
    """The jobs of a multirun."""
    if not sweep_dir.is_dir():
        raise UserError(f"sweep={sweep_dir}: no such folder")
    found = [Job(folder, overrides, summary) for folder, overrides, summary in jobs_of(sweep_dir)]
    if not found:
        raise UserError(f"sweep={sweep_dir}: holds no jobs; pass the folder of a train.py -m")
    for job in found:
        if not job.summary:
            report(f"left out: {job.folder} did not finish")
    return found


def sweep_subjects(cfg: DictConfig, jobs: Sequence[Job]) -> list[Subject]:
    """The base and every finished job."""
    weights = cfg.model.get("weights")
    base = [Subject("base", weights, weights=weights)] if weights is not None else []
    return [*base, *job_subjects(jobs)]


class RunParts(NamedTuple):
    """A run as at its first step: its model, with adapters and new words attached, and what attached them."""

    model: DiffusionModel
    tuning: Tuning
    objective: Objective


def rebuild(run: Path, trust: Sequence[str] = ()) -> tuple[DiffusionModel, Tuning]:
    """The model of a run and what trained it; see `rebuild_parts`."""
    model, tuning, _ = rebuild_parts(run, trust)
    return model, tuning


def config_of(run: Path, trust: Sequence[str] = ()) -> DictConfig:
    """The config of a run, resolved.

    trust: packages whose classes it may name. Raises UserError if it names others, or is missing.
    """
    config = run / ".hydra" / "config.yaml"
    if not config.is_file():
        raise UserError(f"{config} is missing: without it the run's checkpoints cannot be opened")
    cfg = read_config(config, trust)
    try:
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise UserError(f"{config}: {' '.join(str(error).split())[:300]}; it is not the config of a run") from error
    return cfg


def rebuild_parts(run: Path, trust: Sequence[str] = ()) -> RunParts:
    """A run as at its first step. Raises UserError if its config cannot be used; see `config_of`."""
    cfg, config = config_of(run, trust), run / ".hydra" / "config.yaml"
    if missing := [name for name in PARTS_OF_A_RUN if "_target_" not in (cfg.get(name) or {})]:
        raise UserError(f"{config}: has no {' and no '.join(missing)}; it is not the config of a run")
    try:
        check(OmegaConf.create({name: cfg[name] for name in PARTS_OF_A_RUN}))
    except ConfigError as error:
        raise UserError(f"{config}: {error}") from error
    model, objective = build(start_from_merge(cfg.model, trust)), build(cfg.objective)
    tuning = build(cfg.tuning)
    tuning.base_scheduler = model.scheduler
    model.set_prediction_type(objective.prediction, objective.zero_terminal_snr)
    tuning.attach(model)
    return RunParts(model, tuning, objective)


def write(comparison: Comparison, results: Results) -> list[Path]:
    """Write tables, contact sheet and report; returns their paths."""
    folder = comparison.run_dir
    try:
        tables = write_tables(folder, results)
        write_contact_sheet(folder / "grid.png", results)
        write_page(folder / "report.html", results)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror}); its images are kept, and the same command with the "
            "same run_dir continues"
        ) from error
    if comparison.logger:
        from sdft.training.callbacks.tracking import log_comparison

        for logger in comparison.logger.values():
            log_comparison(logger, results, folder)
    return [folder / "report.html", folder / "grid.png", *tables, folder / "pictures"]


def report_lines(
    results: Results, front: Sequence[str], written: Sequence[Path], left_out: Sequence[str], why_not: str
) -> Iterator[str]:
    """The lines that the command prints at its end: metrics, verdicts and paths."""
    if results.metrics:
        yield f"\n{terminal_table(results)}\n"
    # Detected differences, and the metrics of the recommendation; the report has all.
    directed = {metric.name for metric in results.metrics if metric.better}
    for verdict in results.verdicts:
        if verdict.metric in directed and (verdict.p < LEVEL or verdict.metric in front):
            yield verdict.sentence
    if results.headline:
        yield f"\n{results.headline.sentence}"
        if results.headline.detail:
            yield f"  {results.headline.detail}"
    if results.tradeoff is None and len(results.subjects) > 1:
        yield why_not
    if left_out:
        yield f"not measured: {', '.join(left_out)}"
    for path in written:
        yield f"  {path.name:16} {path}"
