"""What is told about a run: its config and code, pictures, Weights & Biases. The only user of wandb."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from sdft.training.receipt import git_state


def wandb_logger(
    save_dir: str | None,
    name: str,
    project: str = "sdft",
    mode: Literal["auto", "online", "offline"] = "auto",
    tags: list[str] | None = None,
    resume: str | None = None,
) -> WandbLogger:
    """Weights & Biases.

    mode: `auto` is online where an API key is at hand (`wandb login`), offline elsewhere.
    resume: where it is set, a run of W&B that was begun in this `save_dir` goes on, under its id in `wandb_id.txt`.
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")  # read once, at the first question
    chosen = os.environ.get("WANDB_MODE") if mode == "auto" else mode
    offline = chosen != "online" if chosen else not wandb.login(prompt=False, verify=False)
    logger = WandbLogger(
        project=project, name=name, save_dir=save_dir, offline=offline, tags=tags, log_model=False,
        id=run_id(Path(save_dir or "."), bool(resume)), resume="allow",
        mode="offline" if offline else "online",  # Lightning says so by WANDB_MODE, which was read with the key
    )  # fmt: skip
    logger._wandb_init.pop("anonymous", None)  # Lightning 2.6 always says it, and W&B warns of it
    return logger


def run_id(folder: Path, goes_on: bool) -> str | None:
    """The id under which W&B knows the run of this folder; a new one, unless the run goes on."""
    if rank_zero_only.rank:
        return None  # only the first process of a run speaks to W&B
    file = folder / "wandb_id.txt"
    if goes_on and file.is_file():
        return file.read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(fresh := secrets.token_hex(4), encoding="utf-8")
    return fresh


def log_picture(trainer: L.Trainer, name: str, path: Path, step: int) -> None:
    """Show a picture file in W&B, where it is on."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], step=step)


def log_run(trainer: L.Trainer, config: dict[str, Any]) -> None:
    """Tell every logger the composed config and the state of the code."""
    for logger in trainer.loggers:
        logger.log_hyperparams({**config, "git": git_state()})


def finish(trainer: L.Trainer, summary: dict[str, Any]) -> None:
    """Give W&B the figures of the run as its summary, and close it: the next job of a sweep is another run."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update({k: v for k, v in summary.items() if isinstance(v, int | float | str)})
            logger.experiment.finish()


def log_comparison(logger: Any, results: Any, folder: Path) -> None:
    """A table of every picture with its settings and figures, the figures of each subject, and the sheet."""
    if not isinstance(logger, WandbLogger):
        return
    import wandb

    metrics = [metric.name for metric in results.metrics]
    axes = list(results.axes)
    table = wandb.Table(columns=["subject", *axes, "picture", *metrics])
    for picture in results.pictures:
        told = [picture.axes.get(axis) for axis in axes]
        shown = wandb.Image(str(folder / picture.path))
        table.add_data(picture.subject, *told, shown, *(picture.figures.get(name) for name in metrics))
    logger.experiment.log({"pictures": table, "grid": wandb.Image(str(folder / "grid.png"))})
    for subject, own in results.figures.items():
        logger.experiment.summary.update({f"{subject}/{name}": figure.value for name, figure in own.items()})
    logger.experiment.finish()
