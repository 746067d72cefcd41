"""Compare models on the same prompts and seeds: `python eval.py subjects='{base: nano, mine: RUN_FOLDER}'`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sdft.config.command import build, verb
from sdft.distributed.processes import ProcessInfo
from sdft.errors import UserError
from sdft.evaluation.comparison import Comparison, generate_images, measure, recommend
from sdft.evaluation.page.write import write_page
from sdft.evaluation.results import Results
from sdft.evaluation.statistics import LEVEL
from sdft.evaluation.subject_loader import SubjectLoader
from sdft.evaluation.subjects import Subject
from sdft.evaluation.sweeps import Job, add_training_values, job_subjects, training_values
from sdft.evaluation.tables import terminal_table, write_contact_sheet, write_tables
from sdft.models.sdxl import SDXL
from sdft.training.sweep import jobs_of


@verb("eval")
def main(cfg: DictConfig) -> None:
    """One comparison, from config to images, metrics and `report.html`."""
    place, hydra = ProcessInfo.current(), HydraConfig.get()
    if place.world_size > 1 and not any(override.startswith("run_dir=") for override in hydra.overrides.task):
        raise UserError("run_dir is not set: several processes share one comparison, so pass run_dir=FOLDER to all")
    cfg.run_dir = hydra.runtime.output_dir
    comparison = build(cfg)
    # The cheap parts first: a wrong path is reported before any weights are loaded.
    jobs = read_jobs(comparison.sweep) if comparison.sweep else []
    subjects = sweep_subjects(cfg, jobs) if comparison.sweep else comparison.read_subjects()
    wanted = comparison.build_grid(subjects)
    baseline = next(c.variant for c in wanted if c.subject.name == (comparison.baseline or subjects[0].name))
    inputs = comparison.read_inputs()
    measures, left_out = comparison.available_metrics(inputs)
    models = SubjectLoader(comparison.model, cfg.model.get("weights"), find_device(), rebuild)
    generated = generate_images(comparison, subjects, models, place)
    if place.rank > 0:
        return
    results = measure(comparison, generated, baseline, inputs, measures)
    if jobs:
        results = add_training_values(results, training_values(jobs, subjects))
    tradeoff, why_not = recommend(comparison, results, baseline)
    results = replace(results, tradeoff=tradeoff)
    written = write(comparison, results)
    print_report(results, comparison.front, written, left_out, why_not)


def find_device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))))


def read_jobs(sweep_dir: Path) -> list[Job]:
    """The jobs of a multirun."""
    if not sweep_dir.is_dir():
        raise UserError(f"sweep={sweep_dir}: there is no such folder")
    found = [Job(folder, overrides, summary) for folder, overrides, summary in jobs_of(sweep_dir)]
    if not found:
        raise UserError(f"sweep={sweep_dir}: holds no jobs; pass the folder of a train.py -m")
    for job in found:
        if not job.summary:
            print(f"left out: {job.folder} did not finish")
    return found


def sweep_subjects(cfg: DictConfig, jobs: Sequence[Job]) -> list[Subject]:
    """The base model and every finished job."""
    weights = cfg.model.get("weights")
    base = [Subject("base", weights, weights=weights)] if weights is not None else []
    return [*base, *job_subjects(jobs)]


def rebuild(run: Path) -> SDXL:
    """The model of a run as it was at its first step, with its adapters or new words attached."""
    config = run / ".hydra" / "config.yaml"
    if not config.is_file():
        raise UserError(f"{config} is missing: without it the run's checkpoints cannot be opened")
    cfg: Any = OmegaConf.load(config)
    OmegaConf.resolve(cfg)
    model, objective = build(cfg.model), build(cfg.objective)
    model.expect(objective.prediction, objective.zero_terminal_snr)
    build(cfg.tuning).attach(model)
    return model


def write(comparison: Comparison, results: Results) -> list[Path]:
    """Write the tables, the contact sheet and the page; returns their paths."""
    folder = comparison.run_dir
    try:
        tables = write_tables(folder, results)
        write_contact_sheet(folder / "grid.png", results)
        write_page(folder / "report.html", results)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written to ({error.strerror}); the images are kept, and the same command with the "
            "same run_dir continues"
        ) from error
    if comparison.logger:
        from sdft.training.callbacks.tracking import log_comparison

        for logger in comparison.logger.values():
            log_comparison(logger, results, folder)
    return [folder / "report.html", folder / "grid.png", *tables, folder / "pictures"]


def print_report(
    results: Results, front: Sequence[str], written: Sequence[Path], left_out: Sequence[str], why_not: str
) -> None:
    """Print the table, the main verdicts, the recommendation and the paths of the files."""
    if results.metrics:
        print(f"\n{terminal_table(results)}\n")
    # Differences that were found, and those of the recommendation; the page has all.
    directed = {metric.name for metric in results.metrics if metric.better}
    for verdict in results.verdicts:
        if verdict.metric in directed and (verdict.p < LEVEL or verdict.metric in front):
            print(verdict.sentence)
    if results.tradeoff:
        print(f"keep {results.tradeoff.recommended}: {results.tradeoff.reason}")
    elif len(results.subjects) > 1:
        print(why_not)
    if left_out:
        print(f"not measured: {', '.join(left_out)}")
    for path in written:
        print(f"  {path.name:16} {path}")


if __name__ == "__main__":
    main()
