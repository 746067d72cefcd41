"""`dry_run=true`: from the config of a run, or of a sweep's jobs, to what is printed about them. Starts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig

from sdft.config.command import build
from sdft.distributed.processes import num_processes
from sdft.hardware import default_precision, num_gpus


def print_plan(configs: Sequence[DictConfig], jobs: Sequence[Sequence[str]] = ()) -> None:
    """Tells about one run, or lists the jobs of a sweep by the numbers that `hydra.job.num=` takes."""
    if not jobs:
        print("\n".join(describe_run(configs[0])))
        return
    for number, words in enumerate(jobs):
        print(f"job {number}: {' '.join(words)}")
    print(f"{len(jobs)} jobs; as an array of SLURM: sbatch --array=0-{len(jobs) - 1} slurm/sweep.sbatch ...")


def describe_run(cfg: DictConfig) -> list[str]:
    """What the run would be, need and take. Raises UserError where it cannot work."""
    from sdft.module import Finetuning
    from sdft.planning.footprint import MetaBuild

    data, tuning, objective, _, _ = (build(cfg[name]) for name in ("data", "tuning", "objective", "verdict", "export"))
    model = model_on_meta(cfg.model)
    with MetaBuild():
        module = Finetuning(model, tuning, objective, build(cfg.optimizer), build(cfg.lr_schedule), cfg.seed)
    num_averages = sum(callback._target_.endswith(".EMA") for callback in cfg.callbacks.values())
    lines = build(cfg.preflight)(module, data, run_setup(cfg), num_averages)
    return [f"{cfg.name}: {cfg.size} px; nothing is trained or written", *lines]


def model_on_meta(node: DictConfig) -> Any:
    """The model on the meta device, without reading weights where there are any to read."""
    if node._target_ == "sdft.models.load.pretrained":
        return build(node, _target_="sdft.models.load.pretrained_on_meta")
    return build(node).to("meta")


def run_setup(cfg: DictConfig) -> Any:
    """How the run is spread."""
    from sdft.planning.footprint import Setup

    said = cfg.trainer
    on_gpu = said.accelerator == "gpu" or num_gpus(said.accelerator) > 0 or cfg.preflight.memory is not None
    num_devices = num_processes(said.accelerator, said.devices, said.num_nodes)
    divided = isinstance(said.strategy, DictConfig) and said.strategy._target_.endswith(".fsdp")
    return Setup(
        max_steps=said.max_steps,
        accumulate=said.accumulate_grad_batches,
        precision=default_precision(on_gpu) if said.precision == "auto" else said.precision,
        num_devices=num_devices,
        num_shards=(said.strategy.shard_ranks or num_devices) if divided else 1,
        on_gpu=on_gpu,
    )
