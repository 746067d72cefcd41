"""Train: `python train.py experiment=dreamy_style`. Every axis of `conf/` can be chosen and swept."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sdft.config.command import build, verb
from sdft.distributed.processes import ProcessInfo, num_processes
from sdft.errors import UserError
from sdft.formats.run_folder import SUMMARY
from sdft.hardware import autocast_precision
from sdft.planning.dry_run import print_plan
from sdft.protocols import strategy_hooks
from sdft.training import receipt
from sdft.training.sweep import finished, print_table, run_apart


@verb("train", finish_sweep=print_table, print_plan=print_plan, recall=receipt.recalled)
def main(cfg: DictConfig) -> float | None:
    """One run, from config to weights, pictures and `summary.json`; returns the metric that sweeps rank by."""
    job = HydraConfig.get()
    cfg.run_dir = job.runtime.output_dir
    if not OmegaConf.is_missing(job.job, "num"):
        done = finished(Path(cfg.run_dir), job.overrides.task)
        if done is not None:
            print(f"{cfg.name}: {cfg.run_dir} is finished", flush=True)
        elif job.mode == RunMode.MULTIRUN and num_devices(cfg.trainer) > ProcessInfo.current().world_size:
            run_apart(job)
            done = finished(Path(cfg.run_dir), job.overrides.task)
        if done is not None:
            return done.get(cfg.metric)
    if cfg.reproduce:
        torch.set_num_threads(receipt.read(cfg.reproduce)["threads"])  # sums of floats depend on it
    # The cheap parts first: a wrong number or an empty folder is told before any weights are read.
    data, tuning, objective, verdict, export = (
        build(cfg[name]) for name in ("data", "tuning", "objective", "verdict", "export")
    )
    optimizer, lr_schedule = build(cfg.optimizer), build(cfg.lr_schedule)
    checkpoint = find_checkpoint(cfg.resume, Path(cfg.run_dir))
    trainer = build(
        cfg.trainer,
        callbacks=[build(callback) for callback in cfg.callbacks.values()],
        loggers=[build(logger) for logger in cfg.logger.values()],
    )

    from sdft.module import Finetuning

    def finetuning(model) -> Finetuning:
        return Finetuning(model, tuning, objective, optimizer, lr_schedule, cfg.seed)

    model = build(cfg.model)
    record = begin_receipt(cfg, model, data, trainer)
    module = finetuning(model)
    announce(cfg, module, data, trainer)
    log_run(trainer, cfg)
    started = time.monotonic()
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    train_seconds = time.monotonic() - started
    module = strategy_hooks(trainer.strategy).gather(module, lambda: finetuning(build(cfg.model)))
    if trainer.global_rank != 0:
        return None
    return conclude(cfg, trainer, module, export, verdict, train_seconds, record)



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


def begin_receipt(cfg: DictConfig, model, data, trainer) -> dict[str, Any]:
    """What the run is made from, written before it starts: the code may change while it runs."""
    if trainer.global_rank:
        return {}
    said, task = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)), HydraConfig.get().overrides.task
    record = receipt.begun(said, task, model, data, trainer.world_size)
    write_json(Path(cfg.run_dir) / receipt.NAME, record)
    return record


def announce(cfg: DictConfig, module, data, trainer) -> None:
    """The run in a few lines, before it starts."""
    from sdft.planning.preflight import describe_run

    if trainer.global_rank:
        return
    print(f"{cfg.name}: {data.pictures.size_hw[1]} px, {trainer.precision}, run folder {cfg.run_dir}")
    lines = describe_run(module, data, trainer.max_steps, trainer.accumulate_grad_batches, trainer.world_size)
    print("\n".join(lines), flush=True)


def conclude(cfg: DictConfig, trainer, module, export, verdict, train_seconds: float, record: dict) -> float | None:
    """Export, judge and report a finished run."""
    from sdft.evaluation.verdict import BEFORE_AFTER
    from sdft.training.callbacks.tracking import finish, log_picture
    from sdft.tuning.parameters import trainable_parameters

    run_dir = Path(cfg.run_dir)
    module.eval()
    artifacts, errors = export(module, run_dir, cfg.name, cfg.size, partial(build, cfg.model))
    base = partial(module.tuning.base, module.model)
    figures = verdict(module.model, base, run_dir, autocast_precision(trainer.precision)) if verdict else {}
    if (run_dir / BEFORE_AFTER).is_file():
        artifacts["pictures"] = run_dir / BEFORE_AFTER
        log_picture(trainer, "before_after", artifacts["pictures"], trainer.global_step)
    summary = {
        "name": cfg.name,
        **figures,
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
    tell(summary, run_dir)
    if cfg.reproduce:
        print(receipt.compared(receipt.read(cfg.reproduce), record))
    if cfg.metric not in summary and not HydraConfig.get().sweeper._target_.endswith(".BasicSweeper"):
        known = ", ".join(record["figures"])
        raise UserError(f"metric={cfg.metric}: the run has no such figure to search by; set metric= one of {known}")
    return summary.get(cfg.metric) if cfg.metric else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as JSON, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def tell(summary: dict[str, Any], run_dir: Path) -> None:
    """What came out, where it lies and what to do with it."""
    print(f"\n{summary['name']}: trained in {summary['train_seconds']:.0f} s")
    for name, value in summary.items():
        if isinstance(value, float) and name != "train_seconds":
            print(f"  {name:26} {value:.3f}")
    if "style_gain_note" in summary:
        print(f"  style_gain                 {summary['style_gain_note']}")
    for name, path in summary["artifacts"].items():
        print(f"  {name:10} {path}")
    print(f"  figures    {run_dir / SUMMARY}")
    if lora := summary["artifacts"].get("lora"):
        print(f"next: look at the pictures, then pipeline.load_lora_weights({lora!r}) in diffusers")
    elif model := summary["artifacts"].get("model"):
        print(f"next: look at the pictures, then train from it with model.weights={model}")


def log_run(trainer, cfg: DictConfig) -> None:
    """Tell every logger what is run."""
    from sdft.training.callbacks import tracking

    tracking.log_run(trainer, cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)))


if __name__ == "__main__":
    main()
