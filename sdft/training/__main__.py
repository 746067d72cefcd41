"""Train: `python train.py experiment=dreamy_style`. Every axis of `conf/` can be chosen and swept."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sdft.config.command import build_optional, command, tries_all
from sdft.config.trust import refuse_untrusted_overrides, trusted_by
from sdft.distributed.processes import ProcessInfo
from sdft.distributed.run_lock import run_lock
from sdft.errors import UserError
from sdft.planning.dry_run import print_plan
from sdft.training import receipt
from sdft.training.run import finetune, num_devices, unmeasured
from sdft.training.sweep import finished, print_table, run_apart


def recall(overrides: Sequence[str]) -> list[str]:
    """The overrides of a command, after those of `reproduce=RECEIPT`, in which nothing may run code."""
    found = receipt.recalled(overrides)
    if file := receipt.file_in(overrides):
        refuse_untrusted_overrides(found[: len(found) - len(overrides)], file, trusted_by(overrides))
    return found


@command("train", finish_sweep=print_table, print_plan=print_plan, recall=recall)
def main(cfg: DictConfig) -> float | None:
    """One run, from config to weights, images and `summary.json`; returns the metric that sweeps rank by."""
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
    searches = not tries_all(job.sweeper)
    if searches and (why := unmeasured(build_optional(cfg.verdict)).get(cfg.metric)):
        raise UserError(f"metric={cfg.metric}: a search has nothing to go by: {why}")
    with run_lock(Path(cfg.run_dir)):  # of a job of a sweep; a single run has it already
        result = finetune(cfg, list(job.overrides.task), partial(print, flush=True))
    if result is None:
        return None
    if cfg.metric not in result.summary and searches:
        known = ", ".join(result.receipt["figures"])
        raise UserError(f"metric={cfg.metric}: the run has no such metric to search by; set metric= to one of {known}")
    return result.summary.get(cfg.metric) if cfg.metric else None


if __name__ == "__main__":
    main()
