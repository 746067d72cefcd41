"""Commands: turns a function of a config into one, whose jobs are all composed and checked before the first one runs."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sdft.config.check import check, locate, resolve
from sdft.config.compose import BasicSweeper, Composer, composer, get_args_parser
from sdft.config.keys import ConfigError
from sdft.distributed.processes import ProcessInfo, exit_with_error
from sdft.errors import UserError

__all__ = ["CONF_DIR", "ConfigError", "build", "check", "command", "compose", "quoted"]

PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
"""In an installed package beside its modules, in a checkout beside `sdft/`."""
MOST_JOBS = 1000
"""Of a grid that are all checked; of a larger one, each value is checked once."""
ERROR = "error.txt"
"""In the folder of a job of a sweep that failed."""


def compose(
    root: str, overrides: Sequence[str] = (), conf_dir: Path = CONF_DIR, config_dirs: Sequence[str | Path] = ()
) -> DictConfig:
    """The config of one job of the command `root`, every value present and every interpolation resolvable.

    config_dirs: folders of your own that add options to any group, as `--config-dir` does.

    Raises ConfigError, one sentence, for anything misspelt, misplaced, missing or meaningless in this combination.
    """
    with composer(root, conf_dir, overrides, config_dirs) as opened:
        cfg = _without_hydra(opened.load(opened.fill_open_dicts(overrides)))
    resolve(cfg)
    return cfg


def build(node: DictConfig, **arguments: Any) -> Any:
    """The object that a `_target_` node describes; a UserError of its constructor comes through as it is."""
    try:
        return instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        raise (cause or error) from None


def command(
    root: str,
    *,
    conf_dir: Path = CONF_DIR,
    finish_sweep: Callable[[Path], None] | None = None,
    print_plan: Callable[[list[DictConfig], list[list[str]]], None] | None = None,
    recall: Callable[[Sequence[str]], list[str]] = list,
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make a function of a config a command; a UserError is one message on stderr and exit status 2.

    finish_sweep: called with the sweep directory after the last job of `-m`, and after the job that `hydra.job.num=`
        chooses. print_plan: with `dry_run=true`, called instead with the configs of all jobs, and in a sweep with the
        overrides of each; no folder is made. recall: turns the overrides of the command line into those to compose.
    """

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(function)
        def main() -> None:
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            arguments = list(sys.argv)
            try:
                # Last, as `python -m` has it first: packages of the user beside the folder of the command.
                if os.getcwd() not in sys.path:
                    sys.path.append(os.getcwd())
                args, unknown = get_args_parser().parse_known_intermixed_args()
                if unknown:
                    name = unknown[0].lstrip("-").replace("-", "_").partition("=")[0]
                    raise ConfigError(f"'{unknown[0]}' is not a flag; settings are written {name}=value")
                flags = [argument for argument in arguments if argument not in args.overrides]
                args.overrides = recall(args.overrides)
                plan = _prepare(root, conf_dir, args, function)
                if plan.dry_run and print_plan is not None:
                    return print_plan(plan.dry_run, plan.jobs)
                # Hydra's parser expects the overrides after the flags.
                sys.argv = [*(f for f in flags if not plan.is_one or f not in ("-m", "--multirun")), *plan.overrides]
                try:
                    hydra.main(str(Path(conf_dir).absolute()), root, version_base="1.3")(_job(function))()
                finally:
                    if plan.sweep_dir is not None and finish_sweep is not None and ProcessInfo.current().rank == 0:
                        finish_sweep(plan.sweep_dir)
            except UserError as error:
                exit_with_error(error)
            finally:
                sys.argv = arguments

        return main

    return decorate


def _job(function: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """The function as Hydra calls it, in this process or, under a launcher, in another."""

    @functools.wraps(function)
    def run(cfg: DictConfig) -> Any:
        hydra = HydraConfig.get()
        problem = Path(hydra.runtime.output_dir) / ERROR
        if ProcessInfo.current().rank == 0:
            problem.unlink(missing_ok=True)
        try:
            check(cfg)
            return function(cfg)
        except Exception as error:
            if not OmegaConf.is_missing(hydra.job, "num"):
                problem.write_text(f"{error or type(error).__name__}\n", encoding="utf-8")
            # In a sweep the other jobs still run, and Hydra raises the first error after them.
            if isinstance(error, UserError) and hydra.mode != RunMode.MULTIRUN:
                exit_with_error(error)
            raise

    return run


class _Plan(NamedTuple):
    """What a command line comes to."""

    overrides: list[str]
    """Of the job or the sweep."""
    sweep_dir: Path | None = None
    is_one: bool = False
    """One job of a sweep, run by itself."""
    dry_run: Sequence[DictConfig] = ()
    """The configs of the jobs, which are only printed."""
    jobs: Sequence[list[str]] = ()
    """The overrides of each job of a sweep."""


def _prepare(root: str, conf_dir: Path, args: Any, function: Callable[..., Any]) -> _Plan:
    """Checks every job of the command."""
    if args.help or args.hydra_help or args.info or args.shell_completion or args.experimental_rerun:
        return _Plan(args.overrides)
    file = Path(inspect.getfile(function))
    if args.config_path is not None:
        conf_dir = file.parent / args.config_path
    dirs = [args.config_dir] if args.config_dir else []
    with composer(args.config_name or root, conf_dir, args.overrides, dirs, file.stem) as opened:
        overrides = opened.fill_open_dicts(args.overrides)
        if not args.multirun and "hydra.mode=MULTIRUN" not in overrides:
            cfg = opened.load(overrides)
            if args.cfg:
                return _Plan(overrides)
            if cfg.hydra.mode != RunMode.MULTIRUN:
                check(_without_hydra(cfg))
                return _Plan(overrides, dry_run=[cfg] if cfg.get("dry_run") else [])
        return _check_sweep(opened, overrides)


def _without_hydra(cfg: DictConfig) -> DictConfig:
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def _check_sweep(opened: Composer, overrides: Sequence[str]) -> _Plan:
    """Composes and checks all jobs of a sweep; the command is one of them if `hydra.job.num` is set."""
    parsed = opened.parse(overrides)
    fixed = [str(override.input_line) for override in parsed if override.is_hydra_override()]
    master = opened.load_unchecked(parsed, RunMode.MULTIRUN).hydra
    locate(master.launcher._target_, "hydra/launcher")
    params = [f"{key}={value}" for key, value in (master.sweeper.get("params") or {}).items()]
    swept = [*opened.parse(params), *(override for override in parsed if not override.is_hydra_override())]
    is_grid = tries_all(master.sweeper)
    jobs, configs = _jobs(swept, is_grid), []
    for number, job in enumerate(jobs, 1):
        try:
            configs.append(_without_hydra(opened.load([*fixed, *job])))
            check(configs[-1])
        except ConfigError as error:
            raise ConfigError(f"job {number} of {len(jobs)} ({' '.join(job)}): {error}") from None
    if configs[0].get("dry_run"):
        if not is_grid:
            raise ConfigError("dry_run=true: a search decides on its jobs as it goes; describe one of them, without -m")
        return _Plan(list(overrides), dry_run=configs, jobs=jobs)
    try:
        sweep_dir = Path(str(master.sweep.dir)).absolute()
        if OmegaConf.is_missing(master.job, "num"):
            # Hydra composes again, when `${now:}` is later: without this its directory could be another one.
            return _Plan([*overrides, f"hydra.sweep.dir={quoted(master.sweep.dir)}"], sweep_dir)
        job_dir = sweep_dir / str(master.sweep.subdir)
    except OmegaConfBaseException as error:
        raise ConfigError(f"hydra.sweep.dir: {str(error).splitlines()[0]}") from None
    if not is_grid or master.job.num >= len(jobs):
        raise ConfigError(f"hydra.job.num={master.job.num}: the grid has {len(jobs)} jobs, numbered from 0")
    return _Plan([*fixed, *jobs[master.job.num], f"hydra.run.dir={quoted(job_dir)}"], sweep_dir, is_one=True)


def tries_all(sweeper: DictConfig) -> bool:
    """Whether Hydra's sweeper tries all combinations, in the order of their numbers; others search."""
    found = locate(sweeper._target_, "hydra/sweeper")
    return isinstance(found, type) and issubclass(found, BasicSweeper)


def _jobs(overrides: list[Override], is_grid: bool) -> list[list[str]]:
    """The overrides of each job. Of a search or a large grid, each value once with the first of the others."""
    axes = list({override.get_key_element(): _alternatives(override, is_grid) for override in overrides}.values())
    if is_grid and math.prod(map(len, axes)) <= MOST_JOBS:
        return list(map(list, itertools.product(*axes)))
    first = [axis[0] for axis in axes]
    return [first] + [[*first[:i], other, *first[i + 1 :]] for i, axis in enumerate(axes) for other in axis[1:]]


def _alternatives(override: Override, is_grid: bool) -> list[str]:
    if isinstance(sweep := override.value(), IntervalSweep):
        if is_grid:
            raise ConfigError("interval(...) needs a sweeper that searches, such as hydra/sweeper=search")
        return [f"{override.get_key_element()}={end}" for end in (sweep.start, sweep.end)]
    try:
        # Hydra's own, whose text and order the numbers of the jobs follow.
        found = [job[0] for job in BasicSweeper.split_arguments([override], None)[0]]
    except (HydraException, ValueError) as error:
        raise ConfigError(f"{override.input_line} cannot be swept: {str(error).splitlines()[0]}") from None
    if not found:
        raise ConfigError(f"{override.input_line} matches nothing to sweep over")
    return found


def quoted(path: Any) -> str:
    """A path as the value of an override."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"
