"""`dry_run=true`: prints a forecast of a run, or the numbered jobs of a sweep, without starting anything."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from sdft.config.command import CONF_DIR, build, build_optional, switched_on
from sdft.config.trust import as_packages
from sdft.data.sources.shard_copies import MAY_FETCH
from sdft.distributed.processes import num_processes
from sdft.errors import UserError
from sdft.hardware import PRESETS, default_precision, fitting_presets, num_gpus
from sdft.merging.run import start_from_merge
from sdft.planning.steps import set_steps
from sdft.protocols import KeepsAverages, strategy_hooks
from sdft.training.run import build_data, refuse_unpaired


def print_plan(configs: Sequence[DictConfig], jobs: Sequence[Sequence[str]] = ()) -> None:
    """Print the forecast of one run, or the jobs of a sweep with the numbers that `hydra.job.num=` takes."""
    if not jobs:
        print("\n".join(forecast(configs[0])))
        return
    for number, overrides in enumerate(jobs):
        print(f"job {number}: {' '.join(overrides)}")
    print(f"{len(jobs)} jobs; as an array of SLURM: sbatch --array=0-{len(jobs) - 1} slurm/sweep.sbatch ...")


class Planned(NamedTuple):
    """A run on the meta device, as `memory_needs` and `Preflight` take it."""

    module: Any
    data: Any
    setup: Any
    num_averages: int
    num_offloaded_averages: int


def forecast(cfg: DictConfig, look_for_preset: bool = True) -> list[str]:
    """Parameters, batches, memory and time of a run. Raises UserError where it cannot work."""
    from sdft.planning.preflight import MemoryShortage

    run = planned(cfg)
    try:
        lines = build(cfg.preflight)(*run)
    except MemoryShortage as short:
        remedy = preset_that_fits(cfg, short.limit) if look_for_preset else None
        raise UserError(f"{short.problem}; {remedy}") if remedy else short from None
    if (class_images := build_optional(cfg.get("class_images"))) is not None:
        lines.append(class_images.describe())
    return [f"{cfg.name}: {cfg.size} px; nothing is trained or written", *lines]


def forecast_figures(cfg: DictConfig, data: Any = None, timed: bool = True) -> dict[str, float]:
    """Memory and time of a run as numbers, whether it fits here or not; see `Preflight.figures`.

    data: its data module, if it is there. Raises UserError where the run cannot be built.
    """
    from sdft.planning.footprint import memory_needs

    run = planned(copy.deepcopy(cfg), data)
    return build(cfg.preflight).figures(memory_needs(*run), run.setup, timed)


def planned(cfg: DictConfig, data: Any = None) -> Planned:
    """The run of a config. Raises UserError where it cannot be built; sets the number of steps in the config.

    data: its data module, if it is there.
    """
    from sdft.module import Finetuning
    from sdft.optimizers.schedules import refuse_schedule
    from sdft.planning.footprint import MetaBuild

    token = MAY_FETCH.set(False)
    try:
        data = build_data(cfg)[0] if data is None else data
        tuning, objective, _ = (build(cfg[name]) for name in ("tuning", "objective", "export"))
        refuse_unpaired(objective, data)
        build_optional(cfg.verdict)
    finally:
        MAY_FETCH.reset(token)
    set_steps(cfg, data)
    model = model_on_meta(start_from_merge(cfg.model, as_packages(cfg.trust), dry_run=True))
    with MetaBuild():
        optimizer, schedule = build(cfg.optimizer), build(cfg.lr_schedule)
        refuse_schedule(optimizer, schedule)
        parts = build(cfg.get("part_schedules"))
        module = Finetuning(model, tuning, objective, optimizer, schedule, cfg.seed, cfg.fused_backward, parts)
    kept = [num_averages(callback._target_) for callback in switched_on(cfg.callbacks)]
    offloaded = [bool(callback.get("offload")) for callback in switched_on(cfg.callbacks)]
    num_offloaded = sum(num for num, is_offloaded in zip(kept, offloaded, strict=True) if is_offloaded)
    return Planned(module, data, run_setup(cfg), sum(kept) - num_offloaded, num_offloaded)


def preset_that_fits(cfg: DictConfig, memory: float) -> str | None:
    """The option of `hardware=` for a card of `memory` GiB or less with which the run fits, else the smallest card on
    which it does; None if there is no preset for it."""
    fitting = fitting_presets(memory)
    ends = dict.fromkeys([*fitting[:1], *fitting[-1:]])  # the fastest, and the one that needs least
    for preset in [*ends, *(name for name in PRESETS if name not in fitting)]:
        base = copy.deepcopy(cfg)
        OmegaConf.set_struct(base, False)
        base.model.quantization = {}  # merging would only add to that of another preset
        preset_cfg: Any = OmegaConf.merge(base, OmegaConf.load(CONF_DIR / "hardware" / f"{preset}.yaml"))
        preset_cfg.preflight.memory = min(memory, PRESETS[preset]) if preset in fitting else PRESETS[preset]
        try:
            forecast(preset_cfg, look_for_preset=False)
        except UserError:
            continue
        smallest = f"the smallest card that it fits on has {PRESETS[preset]} GB (hardware={preset})"
        return f"hardware={preset} fits" if preset in fitting else smallest
    return None


def model_on_meta(node: DictConfig) -> Any:
    """The model on the meta device; its weights are not read if its loader has a counterpart for that."""
    from sdft.models.load import ON_META

    counterpart = ON_META.get(get_object(node._target_))
    if counterpart is None:
        return build(node).to("meta")
    return build(node, _target_=f"{counterpart.__module__}.{counterpart.__qualname__}")


def num_averages(target: str) -> int:
    """How many averages of the trainable parameters a callback keeps."""
    found = get_object(target)
    return found.num_averages if isinstance(found, type) and issubclass(found, KeepsAverages) else 0


def is_a(target: str, kind: type) -> bool:
    """Whether a dotted name is that of a class of this kind."""
    found = get_object(target)
    return isinstance(found, type) and issubclass(found, kind)


def run_setup(cfg: DictConfig) -> Any:
    """Steps, precision, processes and shards of the run."""
    from sdft.planning.footprint import Setup
    from sdft.training.callbacks.previews import Previews

    trainer = cfg.trainer
    on_gpu = trainer.accelerator == "gpu" or num_gpus(trainer.accelerator) > 0 or cfg.preflight.memory is not None
    num_devices = num_processes(trainer.accelerator, trainer.devices, trainer.num_nodes)
    previews = [build(callback) for callback in switched_on(cfg.callbacks) if is_a(callback._target_, Previews)]
    draws = previews or "_target_" in (cfg.verdict or {}) or cfg.get("class_images") is not None
    areas = [math.prod(prompt.size_hw) for one in previews for prompt in one.prompts]
    strategy = build(trainer.strategy) if isinstance(trainer.strategy, DictConfig) else trainer.strategy
    return Setup(
        max_steps=trainer.max_steps,
        accumulate=trainer.accumulate_grad_batches,
        precision=default_precision(on_gpu) if trainer.precision == "auto" else trainer.precision,
        num_devices=num_devices,
        num_shards=strategy_hooks(strategy).num_shards(num_devices),
        on_gpu=on_gpu,
        num_nodes=trainer.num_nodes,
        num_drawn=cfg.sampler.batch_size if draws else 0,
        drawn_side=max(cfg.size, math.ceil(max(areas, default=0) ** 0.5)),
    )
