"""Logging of configs, images and comparisons to Weights & Biases and TensorBoard."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from sdft.training.callbacks.tensorboard import TensorBoard
from sdft.training.receipt import git_state


def wandb_logger(
    save_dir: str | None,
    name: str,
    project: str = "sdft",
    mode: Literal["auto", "online", "offline"] = "auto",
    tags: list[str] | None = None,
    resume: str | None = None,
) -> WandbLogger:
    """A logger for Weights & Biases.

    mode: `auto` is online after `wandb login`, offline otherwise.
    resume: if set, the W&B run of this `save_dir` is continued, by its id in `wandb_id.txt`.
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")  # read once, at the first call
    chosen = os.environ.get("WANDB_MODE") if mode == "auto" else mode
    offline = chosen != "online" if chosen else not wandb.login(prompt=False, verify=False)
    logger = WandbLogger(
        project=project, name=name, save_dir=save_dir, offline=offline, tags=tags, log_model=False,
        id=run_id(Path(save_dir or "."), bool(resume)), resume="allow",
        mode="offline" if offline else "online",  # Lightning would set WANDB_MODE, which was already read with the key
    )  # fmt: skip
    logger._wandb_init.pop("anonymous", None)  # Lightning 2.6 always passes it, and W&B warns of it
    start_without_launcher()
    return logger


def start_without_launcher() -> None:
    """Let a W&B run start without importing W&B Launch, which takes a second.

    W&B does so to look for inputs of a job, which only Launch itself can have set in this process.
    """
    from wandb.sdk.wandb_run import Run

    if "wandb.sdk.launch" not in sys.modules and hasattr(Run, "_detect_and_apply_job_inputs"):
        Run._detect_and_apply_job_inputs = lambda self: None  # type: ignore[method-assign, assignment, misc]


def run_id(folder: Path, resumed: bool) -> str | None:
    """The W&B id of the run in this folder; a new one unless the run is continued."""
    if rank_zero_only.rank:
        return None  # only rank 0 logs to W&B
    file = folder / "wandb_id.txt"
    if resumed and file.is_file():
        return file.read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(fresh := secrets.token_hex(4), encoding="utf-8")
    return fresh


def log_picture(trainer: L.Trainer, name: str, path: Path, step: int) -> None:
    """Log an image file to the loggers that take images. step: number of optimizer steps done."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step=step)
        elif isinstance(logger, TensorBoard):
            # The values of an optimizer step have its number counted from 0; what belongs to none comes after them.
            logger.log_image(name, [str(path)], step=step - trainer.training)


def log_run(trainer: L.Trainer, config: dict[str, Any]) -> None:
    """Log the composed config and the state of the code to every logger."""
    for logger in trainer.loggers:
        logger.log_hyperparams({**config, "git": git_state()})


def finish(trainer: L.Trainer, summary: dict[str, Any]) -> None:
    """Log the metrics of the run, and close the loggers: the next job of a sweep is another W&B run."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoard):
            logger.finish(summary, trainer.global_step)
        elif isinstance(logger, WandbLogger):
            logger.experiment.summary.update({k: v for k, v in summary.items() if isinstance(v, int | float | str)})
            logger.experiment.finish()


def log_comparison(logger: Any, results: Any, folder: Path) -> None:
    """Log a table of all images with settings and metrics, the metrics of each subject, and the contact sheet.

    TensorBoard has no tables.
    """
    if isinstance(logger, TensorBoard):
        for subject, own in results.figures.items():
            logger.log_metrics({f"{subject}/{name}": estimate.value for name, estimate in own.items()}, 0)
        logger.log_image("grid", [str(folder / "grid.png")], 0)
        logger.finish({})
        return
    if not isinstance(logger, WandbLogger):
        return
    import wandb

    metrics = [metric.name for metric in results.metrics]
    axes = list(results.axes)
    table = wandb.Table(columns=["subject", *axes, "picture", *metrics])
    for picture in results.pictures:
        settings = [picture.axes.get(axis) for axis in axes]
        shown = wandb.Image(str(folder / picture.path))
        table.add_data(picture.subject, *settings, shown, *(picture.figures.get(name) for name in metrics))
    logger.experiment.log({"pictures": table, "grid": wandb.Image(str(folder / "grid.png"))})
    for subject, own in results.figures.items():
        logger.experiment.summary.update({f"{subject}/{name}": estimate.value for name, estimate in own.items()})
    logger.experiment.finish()
