"""One fine-tuning run, from config to weights, images and `summary.json`: what `train.py` and the Python API call."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from sdft.config.command import build, build_optional
from sdft.config.exits import foreseen, hidden, hide_environment
from sdft.distributed.processes import num_processes
from sdft.errors import UserError
from sdft.formats.output import no_room, refuse_to_replace
from sdft.formats.run_folder import SUMMARY
from sdft.hardware import autocast_precision
from sdft.optimizers.schedules import refuse_schedule
from sdft.planning.steps import set_steps
from sdft.protocols import PartialVerdict, strategy_hooks
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
    data, tuning, objective, export = (build(cfg[name]) for name in ("data", "tuning", "objective", "export"))
    verdict = build_optional(cfg.verdict)
    data.resume_with_changed_data = cfg.resume_with_changed_data
    set_steps(cfg, data)
    optimizer, lr_schedule = build(cfg.optimizer), build(cfg.lr_schedule)
    refuse_schedule(optimizer, lr_schedule)
    checkpoint = find_checkpoint(cfg.resume, Path(cfg.run_dir))
    refuse_to_replace(Path(cfg.run_dir) / "model", overwrite=True)
    trainer = build(
        cfg.trainer,
        callbacks=[build(callback) for callback in cfg.callbacks.values()],
        loggers=[build(logger) for logger in cfg.logger.values()],
    )

    from sdft.module import Finetuning

    def finetuning(model) -> Finetuning:
        return Finetuning(model, tuning, objective, optimizer, lr_schedule, cfg.seed, cfg.fused_backward)

    model = build(cfg.model)
    record = begin_receipt(cfg, overrides, model, data, trainer)
    module = finetuning(model)
    announce(cfg, module, data, trainer, verdict, report)
    log_run(trainer, cfg)
    started = time.monotonic()
    with naming_checkpoint(cfg.resume, checkpoint):
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    train_seconds = time.monotonic() - started
    free_training_state(trainer, module)
    module = strategy_hooks(trainer.strategy).gather(module, lambda: finetuning(build(cfg.model)))
    if trainer.global_rank != 0:
        return None
    return conclude(cfg, trainer, module, export, verdict, train_seconds, record, report)


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


def begin_receipt(cfg: DictConfig, overrides: Sequence[str] | None, model, data, trainer) -> dict[str, Any]:
    """What the run is made from, written before it starts: the code may change while it runs."""
    if trainer.global_rank:
        return {}
    config = hidden(OmegaConf.to_container(cfg, resolve=True))
    record = receipt.begun(config, overrides, model, data, trainer.world_size)
    write_json(Path(cfg.run_dir) / receipt.NAME, record)
    return record


def announce(cfg: DictConfig, module, data, trainer, verdict, report: Report) -> None:
    """The run in a few lines, before it starts, with the metrics that it will not be able to measure."""
    from sdft.planning.preflight import describe_run

    if trainer.global_rank:
        return
    report(f"{cfg.name}: {data.train_set.size_hw[1]} px, {trainer.precision}, run folder {cfg.run_dir}")
    lines = describe_run(module, data, trainer.max_steps, trainer.accumulate_grad_batches, trainer.world_size)
    lines += [f"  {name} will not be measured: {why}" for name, why in unmeasured(verdict).items()]
    report("\n".join(lines))


def unmeasured(verdict: Any) -> Mapping[str, str]:
    """Metrics that the evaluation after training will not be able to measure -> why."""
    return verdict.unmeasured() if isinstance(verdict, PartialVerdict) else {}


def conclude(
    cfg: DictConfig, trainer, module, export, verdict, train_seconds: float, record: dict, report: Report
) -> FinetuneResult:
    """Export, judge and report a finished run."""
    from sdft.evaluation.after_training import BEFORE_AFTER
    from sdft.training.callbacks.tracking import finish, log_picture
    from sdft.tuning.parameters import trainable_parameters

    run_dir = Path(cfg.run_dir)
    module.eval()
    with finishable(run_dir):
        artifacts, errors = export(module, run_dir, cfg.name, cfg.size)
    base = partial(module.tuning.base, module.model)
    metrics = verdict(module.model, base, run_dir, autocast_precision(trainer.precision)) if verdict else {}
    if (run_dir / BEFORE_AFTER).is_file():
        artifacts["pictures"] = run_dir / BEFORE_AFTER
        log_picture(trainer, "before_after", artifacts["pictures"], trainer.global_step)
    summary = {
        "name": cfg.name,
        **metrics,
        **errors,
        **{name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")},
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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


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
