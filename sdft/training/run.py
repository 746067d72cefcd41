"""One fine-tuning run, from config to weights, images and `summary.json`: what `train.py` and the Python API call."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from sdft.config.command import build, build_optional, switched_on
from sdft.config.exits import foreseen, hidden, hide_environment
from sdft.config.trust import as_packages
from sdft.data.cache import fingerprint
from sdft.distributed.processes import num_processes
from sdft.errors import UserError
from sdft.formats.json_file import write_json
from sdft.formats.output import no_room, refuse_to_replace
from sdft.formats.run_folder import SUMMARY
from sdft.hardware import autocast_precision
from sdft.optimizers.schedules import refuse_schedule
from sdft.planning.steps import set_steps
from sdft.protocols import AddsToSummary, ChecksTuning, PartialVerdict, strategy_hooks
from sdft.training import receipt

Report = Callable[[str], Any]
"""Receives the lines that a command prints."""
NOTE = "_note"
"""Suffix of the key in `summary.json` with the reason why a metric is null."""


@dataclass(frozen=True)
class FinetuneResult:
    """A finished run.

    run_dir: its folder. summary: the content of `summary.json`. receipt: the content of `receipt.json`.
    """

    run_dir: Path
    summary: Mapping[str, Any]
    receipt: Mapping[str, Any]

    @property
    def metrics(self) -> dict[str, float | None]:
        """The numbers of the summary by name; None for one that could not be measured."""
        return {name: value for name, value in self.summary.items() if value is None or isinstance(value, int | float)}

    @property
    def artifacts(self) -> dict[str, Path]:
        """Name (`lora`, `model`, `words`, `pictures` ...) -> written file or folder."""
        return {name: Path(path) for name, path in self.summary["artifacts"].items()}


def finetune(cfg: DictConfig, overrides: Sequence[str] | None, report: Report) -> FinetuneResult | None:
    """Run the training that a checked config describes; None on all processes but the first.

    overrides: what the config was composed with, for the receipt; None if unknown.
    Raises UserError for all that the user can mend.
    """
    hide_environment(cfg)
    if cfg.reproduce:
        torch.set_num_threads(receipt.read(cfg.reproduce)["threads"])  # sums of floats depend on it
    # The cheap parts first: a wrong number or an empty folder is reported before any weights are read.
    loggers = [build(logger) for logger in switched_on(cfg.logger)]
    data, class_images = build_data(cfg)
    tuning, objective, export = (build(cfg[name]) for name in ("tuning", "objective", "export"))
    refuse_unpaired(objective, data)
    verdict = build_optional(cfg.verdict)
    data.resume_with_changed_data = cfg.resume_with_changed_data
    set_steps(cfg, data)
    optimizer, lr_schedule = build(cfg.optimizer), build(cfg.lr_schedule)
    part_schedules = build(cfg.get("part_schedules"))
    refuse_schedule(optimizer, lr_schedule)
    checkpoint = find_checkpoint(cfg.resume, Path(cfg.run_dir))
    refuse_to_replace(Path(cfg.run_dir) / "model", overwrite=True)
    trainer = build_trainer(cfg, loggers, tuning)

    from sdft.module import Finetuning

    def finetuning(model) -> Finetuning:
        options = {"fused_backward": cfg.fused_backward, "part_schedules": part_schedules}
        return Finetuning(model, tuning, objective, optimizer, lr_schedule, cfg.seed, **options)

    model = build_model(cfg)
    if class_images is not None:
        drawn = class_images.draw(model, autocast_precision(trainer.precision), trainer.strategy.root_device)
        if trainer.is_global_zero:
            report(f"{class_images.count} images of '{class_images.prompt}': {drawn}")
    base_weights = fingerprint(model) if trainer.is_global_zero else ""
    module = finetuning(model)  # which refuses what does not fit, before all images are hashed
    record = begin_receipt(cfg, overrides, model, base_weights, data, trainer)
    lines = announce(cfg, module, data, trainer, verdict, report)
    log_run(trainer, cfg)
    with on_page(cfg, trainer, data, lines, report):
        started = time.monotonic()
        with naming_checkpoint(cfg.resume, checkpoint):
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
        train_seconds = time.monotonic() - started
        free_training_state(trainer, module)
        module = strategy_hooks(trainer.strategy).gather(module, lambda: finetuning(build_model(cfg)))
        if trainer.global_rank != 0:
            return None
        return conclude(cfg, trainer, module, export, verdict, train_seconds, record, report)


def build_trainer(cfg: DictConfig, loggers: Sequence[Any], tuning: Any) -> Any:
    """The trainer with its callbacks. Raises UserError for one that does not fit the tuning."""
    callbacks = [build(callback) for callback in switched_on(cfg.callbacks)]
    for callback in callbacks:
        if isinstance(callback, ChecksTuning):
            callback.check_tuning(tuning)
    return build(cfg.trainer, callbacks=callbacks, loggers=loggers)


def refuse_unpaired(objective: Any, data: Any) -> None:
    """Raise UserError for a loss of pairs on data without them, and for pairs with another loss."""
    from sdft.data.pair_datamodule import Pairs
    from sdft.objective.preference import Preference

    needed, there = isinstance(objective, Preference), isinstance(data, Pairs)
    if needed and not there:
        choices = "data=preference data.root=DIR, data=votes data.votes=FILE, or data=toy_preference"
        raise UserError(f"objective=preference: the data has no pairs of pictures; choose {choices}")
    if there and not needed:
        raise UserError("data: pairs of pictures are for objective=preference; choose it, or data without pairs")


def build_data(cfg: DictConfig) -> tuple[Any, Any]:
    """The data module, and the class images that it reads beside the user's own, which are not drawn yet; or None."""
    class_images = build_optional(cfg.get("class_images"))
    if class_images is None:
        return build(cfg.data), None
    from sdft.training.class_images import as_argument  # imports diffusers, which takes seconds

    return build(cfg.data, **as_argument(class_images, get_object(cfg.data._target_))), class_images


def build_model(cfg: DictConfig) -> Any:
    """The model of a run; one that starts from a merge knows from which."""
    recipe = cfg.model.get("merge_recipe")
    if not recipe:
        return build(cfg.model)
    from sdft.merging.run import sha256, start_from_merge  # few runs merge

    node = start_from_merge(cfg.model, as_packages(cfg.trust))
    try:
        model = build(node)
    except UserError as error:
        raise UserError(str(error).replace(f"model.weights={node.weights}", f"model.merge_recipe={recipe}")) from error
    model.merged = {"recipe": Path(recipe).name, "sha256": sha256(Path(recipe).expanduser())}
    return model


def free_training_state(trainer, module) -> None:
    """Drop gradients and optimizer states: exporting and drawing need their room."""
    module.zero_grad(set_to_none=True)
    trainer.strategy.optimizers, trainer.strategy.lr_scheduler_configs = [], []


def num_devices(trainer: DictConfig) -> int:
    """Processes of a run with this trainer on machines like this one."""
    return num_processes(trainer.accelerator, trainer.devices, trainer.num_nodes)


def find_checkpoint(resume: str | None, run_dir: Path) -> Path | None:
    """The checkpoint to go on from: none, `auto` (this run's last, where there is one), a file or a run folder."""
    if resume is None:
        return None
    if resume == "auto":
        last = run_dir / "checkpoints" / "last.ckpt"
        return last if last.is_file() else None
    path = Path(resume).expanduser()
    path = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"resume={resume}: there is no checkpoint {path}; pass a run folder, a .ckpt file or auto")
    return path


def begin_receipt(
    cfg: DictConfig, overrides: Sequence[str] | None, model, base_weights: str, data, trainer
) -> dict[str, Any]:
    """What the run is made from, written before it starts: the code may change while it runs."""
    if trainer.global_rank:
        return {}
    config = hidden(OmegaConf.to_container(cfg, resolve=True))
    record = receipt.begun(config, overrides, model, base_weights, data, trainer.world_size)
    write_json(Path(cfg.run_dir) / receipt.NAME, record)
    return record


def announce(cfg: DictConfig, module, data, trainer, verdict, report: Report) -> list[str]:
    """Report the run in a few lines, before it starts, with the metrics that it will not be able to measure."""
    from sdft.planning.preflight import describe_run

    if trainer.global_rank:
        return []
    report(f"{cfg.name}: {data.train_set.size_hw[1]} px, {trainer.precision}, run folder {cfg.run_dir}")
    lines = describe_run(module, data, trainer.max_steps, trainer.accumulate_grad_batches, trainer.world_size)
    lines += [f"  {name} will not be measured: {why}" for name, why in unmeasured(verdict).items()]
    report("\n".join(lines))
    return lines


def on_page(cfg: DictConfig, trainer, data, lines: Sequence[str], report: Report) -> AbstractContextManager[None]:
    """Inside the `with`, the page of the run, if it has one, follows what happens."""
    from sdft.board.run_page import PAGE
    from sdft.training.callbacks.page import followed, pages_of

    def forecast() -> dict[str, float]:
        from sdft.planning.dry_run import forecast_figures

        return forecast_figures(cfg, data, timed=False)

    if pages_of(trainer) and trainer.is_global_zero:
        report(f"  look at {Path(cfg.run_dir) / PAGE} while it trains")
    return followed(trainer, lines, forecast, hidden)


def unmeasured(verdict: Any) -> Mapping[str, str]:
    """Metrics that the evaluation after training will not be able to measure -> why."""
    return verdict.unmeasured() if isinstance(verdict, PartialVerdict) else {}


def conclude(
    cfg: DictConfig, trainer, module, export, verdict, train_seconds: float, record: dict, report: Report
) -> FinetuneResult:
    """Export, judge and report a finished run."""
    from sdft.formats.run_folder import BEFORE_AFTER
    from sdft.training.callbacks.tracking import finish, log_picture
    from sdft.tuning.parameters import trainable_parameters

    run_dir = Path(cfg.run_dir)
    module.eval()
    with finishable(run_dir):
        artifacts, errors = export(module, run_dir, cfg.name, cfg.size)
    base = partial(module.tuning.drawing_base, module.model)
    metrics = verdict(module.model, base, run_dir, autocast_precision(trainer.precision)) if verdict else {}
    if (run_dir / BEFORE_AFTER).is_file():
        artifacts["pictures"] = run_dir / BEFORE_AFTER
        log_picture(trainer, "before_after", artifacts["pictures"], trainer.global_step)
    of_callbacks: dict[str, Any] = {}
    for callback in trainer.callbacks:
        of_callbacks |= callback.summary() if isinstance(callback, AddsToSummary) else {}
    summary = {
        "name": cfg.name,
        **metrics,
        **errors,
        **{name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")},
        **of_callbacks,
        "train_seconds": round(train_seconds, 1),
        "num_steps": trainer.global_step,
        "num_trained_parameters": sum(p.numel() for _, p in trainable_parameters(module.model)),
        "artifacts": {name: str(path) for name, path in artifacts.items()},
    }
    record = receipt.finished(record, artifacts, summary)
    write_json(run_dir / SUMMARY, summary)
    write_json(run_dir / receipt.NAME, record)
    finish(trainer, summary)
    for line in summary_lines(summary, run_dir):
        report(line)
    if cfg.reproduce:
        report(receipt.compared(receipt.read(cfg.reproduce), record))
    return FinetuneResult(run_dir, summary, record)


@contextmanager
def naming_checkpoint(resume: str | None, checkpoint: Path | None) -> Iterator[None]:
    """Names the checkpoint in an error about what is in it."""
    try:
        yield
    except ValueError as error:
        if checkpoint is None or "loaded state dict" not in str(error):
            raise
        raise UserError(
            f"resume={resume}: the checkpoint {checkpoint} has other parameter groups than this run's optimizer; "
            "resume with the same optimizer and tuning, and full tuning with the version of sdft that saved it"
        ) from error
    except UserError as error:
        if checkpoint is None or not str(error).startswith("resume: the checkpoint"):
            raise
        named = f"resume={resume}: the checkpoint {checkpoint}"
        raise UserError(str(error).replace("resume: the checkpoint", named, 1)) from error


@contextmanager
def finishable(run_dir: Path) -> Iterator[None]:
    """Adds to an error of the disk, while the weights are written, how to write them without training again."""
    from sdft.training.callbacks.preemption import resume_command  # imports Lightning, which takes seconds

    try:
        yield
    except Exception as error:
        known, cause = foreseen(error), error.__cause__ if isinstance(error, UserError) else error
        if known is None or cause is None or not (isinstance(cause, OSError) or no_room(cause)):
            raise
        last = run_dir / "checkpoints" / "last.ckpt"
        again = resume_command(sys.argv, run_dir)
        raise UserError(f"{known}. {last} is intact; this exports it without training again: {again}") from error


def summary_lines(summary: dict[str, Any], run_dir: Path) -> Iterator[str]:
    """The metrics, the paths of the files, and how to use them."""
    yield f"\n{summary['name']}: trained in {summary['train_seconds']:.0f} s"
    for name, value in summary.items():
        if isinstance(value, float) and name != "train_seconds":
            yield f"  {name:26} {value:.3f}"
    for name, value in summary.items():
        if name.endswith(NOTE):
            yield f"  {name.removesuffix(NOTE):26} {value}"
    for name, path in summary["artifacts"].items():
        yield f"  {name:10} {path}"
    yield f"  summary    {run_dir / SUMMARY}"
    if lora := summary["artifacts"].get("lora"):
        yield f"next: look at the images, then pipeline.load_lora_weights({lora!r}) in diffusers"
    elif kohya := summary["artifacts"].get("lora_kohya"):
        yield f"next: look at the images, then use {kohya} in ComfyUI; diffusers cannot load this method"
    elif model := summary["artifacts"].get("model"):
        yield f"next: look at the images, then train from it with model.weights={model}"


def log_run(trainer, cfg: DictConfig) -> None:
    """Log the config to every logger."""
    from sdft.training.callbacks import tracking

    tracking.log_run(trainer, hidden(OmegaConf.to_container(cfg, resolve=True)))
