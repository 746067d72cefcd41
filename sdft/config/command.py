"""Makes commands of functions of a config: all jobs of a command are composed and checked before the first one runs."""

from __future__ import annotations

import functools
import gc
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from sdft.config.check import check, locate, resolve, users_key
from sdft.config.compose import Composer, basic_sweeper, composer, get_args_parser
from sdft.config.exits import exit_for, hidden, hide_environment, unbreakable_streams
from sdft.config.keys import ConfigError
from sdft.config.run_folder import refuse_folder, refuse_name, refuse_path
from sdft.distributed.processes import ProcessInfo
from sdft.distributed.run_lock import run_lock
from sdft.errors import UserError

__all__ = ["CONF_DIR", "ConfigError", "build", "build_optional", "check", "command", "compose", "quoted", "tries_all"]

PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
"""In an installed package beside its modules, in a checkout beside `sdft/`."""
ERROR = "error.txt"
"""In the folder of a job of a sweep that failed."""

Function = Callable[[DictConfig], Any]
PLACES = ("run_dir", "out", "hydra.run.dir", "hydra.sweep.dir")
"""Options that name a folder or file to write."""


def compose(
    root: str, overrides: Sequence[str] = (), conf_dir: Path = CONF_DIR, config_dirs: Sequence[str | Path] = ()
) -> DictConfig:
    """The config of one job of the command `root`, every value present and every interpolation resolvable.

    config_dirs: folders of your own that add options to any group, as `--config-dir` does.

    Raises ConfigError, one sentence, for anything misspelt, misplaced, missing or meaningless in this combination.
    """
    with composer(root, conf_dir, overrides, config_dirs) as opened:
        cfg, _ = opened.load(opened.fill_open_dicts(overrides))
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


def build_optional(node: DictConfig | None) -> Any:
    """The object that a node describes; None for an option such as `verdict=none`, which may have settings but no
    class."""
    return build(node) if node is not None and "_target_" in node else None


def switched_on(group: DictConfig) -> list[DictConfig]:
    """The nodes of a group of named parts, without those set to null, such as `callbacks.previews=null`."""
    return [node for node in group.values() if node is not None]


class Plan(NamedTuple):
    """What a command line comes to, after a check of all its jobs."""

    overrides: list[str]
    sweep_dir: Path | None = None
    dry_run: Sequence[DictConfig] = ()  # the configs of the jobs
    jobs: Sequence[list[str]] = ()  # the overrides of the jobs of a sweep
    run_dir: Path | None = None  # of the one job, if it has a folder of its own


@dataclass(frozen=True)
class command:
    """Decorator: makes a function of a config a command. A UserError is one message on stderr and exit status 2.

    finish_sweep: called with the sweep directory after the last job of `-m`, and after the job that `hydra.job.num=`
        chooses. print_plan: called with the configs of all jobs, and the overrides of those of a sweep, if they have
        `dry_run=true`; nothing is run or written then. recall: turns the overrides given into those to compose.
    """

    root: str
    conf_dir: Path = CONF_DIR
    finish_sweep: Callable[[Path], None] | None = None
    print_plan: Callable[[Sequence[DictConfig], Sequence[list[str]]], None] | None = None
    recall: Callable[[Sequence[str]], list[str]] = list

    def __call__(self, function: Function) -> Callable[[], None]:
        @functools.wraps(function)
        def main() -> None:
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            # Last, as `python -m` has it first: packages of the user beside the folder of the command.
            sys.path += [folder for folder in [os.getcwd()] if folder not in sys.path]
            given = sys.argv
            folders: list[Path] = []
            with unbreakable_streams():
                try:
                    self._run(function, folders)
                except (Exception, KeyboardInterrupt) as error:
                    exit_for(error, next(iter(folders), None))
                finally:
                    sys.argv = given

        return main

    def _run(self, function: Function, folders: list[Path]) -> None:
        """Plan and run the command of `sys.argv`. folders: receives the folder of the run, once it is known."""
        args, unknown = get_args_parser().parse_known_intermixed_args()
        if unknown:
            name = unknown[0].lstrip("-").replace("-", "_").partition("=")[0]
            raise ConfigError(f"'{unknown[0]}' is not a flag; settings are written {name}=value")
        if args.resolve and not args.cfg:
            raise ConfigError("--resolve goes with --cfg: --cfg job --resolve prints the config of the job")
        flags = [word for word in sys.argv if word not in (*args.overrides, "-m", "--multirun")]
        gc.disable()  # a plan imports what the run needs: a million objects, none of them garbage
        try:
            plan = self._plan(args, function)
        finally:
            gc.freeze()
            gc.enable()
        if plan.dry_run and self.print_plan is not None:
            return self.print_plan(plan.dry_run, plan.jobs)
        folders += [folder for folder in (plan.run_dir, plan.sweep_dir) if folder is not None]
        sys.argv = [*flags, *plan.overrides]  # in the order that Hydra's parser needs
        run = hydra.main(str(Path(self.conf_dir).absolute()), self.root, version_base="1.3")(_job(function))
        try:
            # The lock comes before Hydra, which writes into the folder.
            with run_lock(plan.run_dir) if plan.run_dir is not None else nullcontext():
                run()
        finally:
            if plan.sweep_dir is not None and self.finish_sweep is not None and ProcessInfo.current().rank == 0:
                self.finish_sweep(plan.sweep_dir)

    def _plan(self, args: Any, function: Function) -> Plan:
        overrides = [with_home(override) for override in self.recall(args.overrides)]
        if args.help or args.hydra_help or args.info or args.shell_completion or args.experimental_rerun:
            return Plan(overrides)
        file = Path(inspect.getfile(function))
        conf_dir = self.conf_dir if args.config_path is None else file.parent / args.config_path
        config_dirs = [args.config_dir] if args.config_dir else []
        with composer(args.config_name or self.root, conf_dir, overrides, config_dirs, file.stem) as opened:
            overrides = opened.fill_open_dicts(overrides)
            if not args.multirun and "hydra.mode=MULTIRUN" not in overrides:
                cfg, job = opened.load(overrides)
                if added := homes(cfg, overrides):
                    overrides = [*overrides, *added]
                    cfg, job = opened.load(overrides)
                hide_environment(cfg)
                if args.cfg:
                    return Plan(overrides)
                if job.mode != RunMode.MULTIRUN:
                    check(cfg)
                    refuse_places(cfg, "run_dir", cfg.get("run_dir"))
                    if cfg.get("dry_run"):
                        return Plan(overrides, dry_run=[cfg])
                    if "run_dir" not in cfg:
                        return Plan(overrides)
                    folder = _folder(job)
                    return Plan([*overrides, pinned("hydra.run.dir", folder)], run_dir=folder)
            return _plan_sweep(opened, overrides)


def _plan_sweep(opened: Composer, overrides: Sequence[str]) -> Plan:
    parsed = opened.parse(overrides)
    fixed = [str(override.input_line) for override in parsed if override.is_hydra_override()]
    sweep = opened.load_unchecked(parsed, RunMode.MULTIRUN).hydra
    locate(sweep.launcher._target_, "hydra/launcher")
    is_grid = tries_all(sweep.sweeper)
    params = [f"{key}={value}" for key, value in (sweep.sweeper.get("params") or {}).items()]
    swept = [*opened.parse(params), *(override for override in parsed if not override.is_hydra_override())]
    jobs, configs = opened.jobs(swept, is_grid), []
    for number, job in enumerate(jobs, 1):
        try:
            configs.append(opened.load([*fixed, *job])[0])
            hide_environment(configs[-1])
            check(configs[-1])
            refuse_places(configs[-1], "hydra.sweep.dir", sweep.sweep.dir)
        except ConfigError as error:
            raise ConfigError(f"job {number} of {len(jobs)} ({' '.join(job)}): {error}") from None
    with opened.explained(parsed):
        sweep_dir, num = Path(str(sweep.sweep.dir)).absolute(), OmegaConf.select(sweep, "job.num", default=None)
        run_dir = sweep_dir / str(sweep.sweep.subdir) if num is not None else None
    if configs[0].get("dry_run"):
        if not is_grid:
            raise ConfigError("dry_run=true: a search decides on its jobs as it goes; describe one of them, without -m")
        return Plan(list(overrides), None, configs, jobs)
    if num is None:
        return Plan([*overrides, "hydra.mode=MULTIRUN", pinned("hydra.sweep.dir", sweep_dir)], sweep_dir)
    if not is_grid or num >= len(jobs):
        raise ConfigError(f"hydra.job.num={num}: the grid has {len(jobs)} jobs, numbered from 0")
    return Plan([*fixed, *jobs[num], pinned("hydra.run.dir", run_dir)], sweep_dir, run_dir=run_dir)


def with_home(override: str) -> str:
    """An override whose value is a folder to write, with the home directory for `~`, which shells leave behind a `=`.

    Options that are read expand it where they are read.
    """
    key, equals, value = override.partition("=")
    quote = value[:1] if value[:1] in ("'", '"') else ""
    place = value.removeprefix(quote)
    if key.lstrip("+") not in PLACES or not place.startswith("~"):
        return override
    return f"{key}{equals}{quote}{os.path.expanduser(place)}"


def homes(cfg: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Overrides with the home directory for the `~` of folders to write that a file of options names."""
    given = {override.partition("=")[0].lstrip("+") for override in overrides}
    places = {key: OmegaConf.to_container(cfg, resolve=False).get(key) for key in ("run_dir", "out")}  # type: ignore[union-attr]
    return [
        f"{key}={quoted(os.path.expanduser(place))}"
        for key, place in places.items()
        if key not in given and isinstance(place, str) and place.startswith("~")
    ]


def refuse_places(cfg: DictConfig, key: str, folder: Any) -> None:
    """Raise ConfigError for a name or folder that a run cannot have, if the command makes runs."""
    if "run_dir" in cfg:
        refuse_folder(key, folder)
    if "out" in cfg:
        refuse_path("out", cfg.out)
    if "name" in cfg:
        refuse_name(cfg.name)


def _folder(job: DictConfig) -> Path:
    """The folder of a run, with its parents, as Hydra makes it."""
    folder = Path(str(job.run.dir)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def tries_all(sweeper: DictConfig) -> bool:
    """Whether a sweeper of Hydra's config runs all combinations; others search."""
    found = locate(sweeper._target_, "hydra/sweeper")
    return isinstance(found, type) and issubclass(found, basic_sweeper.BasicSweeper)


def _job(function: Function) -> Function:
    """The function as Hydra calls it, in this process or, under a launcher, in another."""

    @functools.wraps(function)
    def run(cfg: DictConfig) -> Any:
        job = HydraConfig.get()
        problem = Path(job.runtime.output_dir) / ERROR
        if ProcessInfo.current().rank == 0:
            problem.unlink(missing_ok=True)
        try:
            check(cfg)
            return function(cfg)
        except Exception as error:
            if isinstance(error, UserError):
                error = UserError(users_key(cfg, str(error))).with_traceback(error.__traceback__)
            if not OmegaConf.is_missing(job.job, "num"):
                problem.write_text(f"{hidden(str(error)) or type(error).__name__}\n", encoding="utf-8")
            if job.mode != RunMode.MULTIRUN:
                exit_for(error, Path(job.runtime.output_dir) if "run_dir" in cfg else None)
            raise error  # in a sweep, Hydra raises the first error after the other jobs

    return run


def pinned(key: str, folder: Any) -> str:
    """The override for a planned folder: Hydra composes again, and `${now:}` is later then."""
    return f"{key}={quoted(folder)}"


def quoted(path: Any) -> str:
    """A path as the value of an override."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"
