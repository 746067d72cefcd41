"""Strict config: composes it, checks it against the constructors it names, and turns a function into a verb.

With its two halves, `config_compose` (words to config) and `config_check` (config to signatures), the only file that
knows Hydra. Must not know any class of the house: it meets them by the dotted names in `conf/`.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import detect_calling_file_or_module_from_task_function, detect_task_name, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sdft.config.check import check, resolve
from sdft.config.compose import Composer, composer
from sdft.config.keys import ConfigError
from sdft.distributed.processes import ProcessInfo
from sdft.errors import UserError

__all__ = ["CONF_DIR", "ConfigError", "build", "check", "compose", "quoted", "verb"]

PACKAGE = Path(__file__).resolve().parents[1]
CONF_DIR = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
"""In an installed package beside its modules, in a checkout beside `sdft/`."""
MOST_JOBS = 1000
ERROR = "error.txt"
"""In the folder of a job of a sweep that failed."""
EXTRAS = {
    "hydra_plugins.hydra_submitit_launcher": ("slurm", "slurm"),
    "hydra_plugins.hydra_optuna_sweeper": ("search", "sweep"),
}
"""Package -> the option that needs it, and the extra that brings it."""


def compose(
    root: str, overrides: Sequence[str] = (), conf_dir: Path = CONF_DIR, config_dirs: Sequence[str | Path] = ()
) -> DictConfig:
    """The config of one job of the command `root`, every value present and every interpolation resolvable.

    config_dirs: folders of your own that add options to any group, as `--config-dir` does.

    Raises ConfigError, one sentence, for anything misspelt, misplaced, missing or meaningless in this combination.
    """
    with composer(root, conf_dir, config_dirs=config_dirs, words=overrides) as opened:
        return _job(opened, opened.fill_open_dicts(overrides))


def verb(
    root: str,
    *,
    conf_dir: Path = CONF_DIR,
    finish_sweep: Callable[[Path], None] | None = None,
    print_plan: Callable[[list[DictConfig], list[list[str]]], None] | None = None,
    recall: Callable[[Sequence[str]], list[str]] = list,
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Makes a function of a config into a command.

    Every job of the command is composed and checked before the first one runs. A UserError, then or later, is one
    message on stderr and exit status 2, however many processes find it. `finish_sweep` is called with the sweep
    directory after the last job of `-m`, and after the only one that `hydra.job.num=` chooses. `print_plan` gets the
    configs of all jobs, and the words of those of a sweep; nothing runs, and no folder is made, where they say
    `dry_run`. `recall` turns the words of the command into those that are composed.
    """

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(function)
        def main() -> None:
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")
            try:
                args = _arguments()
                # Last, as `python -m` has it first: packages of the user beside the folder of the command.
                if os.getcwd() not in sys.path:
                    sys.path.append(os.getcwd())
                flags = [word for word in sys.argv if word not in args.overrides]
                args.overrides = recall(args.overrides)
                command = _prepare(root, conf_dir, args, function)
                if command.dry_run and print_plan is not None:
                    print_plan(command.dry_run, command.jobs)
                    return
                if command.chosen:
                    flags = [flag for flag in flags if flag not in ("-m", "--multirun")]
                try:
                    _run(root, conf_dir, _runner(function), [*flags, *command.words])
                finally:
                    if command.sweep_dir is not None and finish_sweep is not None and ProcessInfo.current().rank == 0:
                        finish_sweep(command.sweep_dir)
            except UserError as error:
                _fail(error)

        return main

    return decorate


def build(node: DictConfig, **arguments: Any) -> Any:
    """The object that a `_target_` node describes; a UserError of its constructor comes through as it is."""
    try:
        return instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        raise (cause or error) from None


def _job(opened: Composer, words: Sequence[str]) -> DictConfig:
    cfg = opened.load(words)
    with open_dict(cfg):
        del cfg["hydra"]
    resolve(cfg)
    return cfg


def _fail(error: UserError) -> NoReturn:
    place = ProcessInfo.current()
    if place.should_print(str(error)):
        # A folder that one machine does not see is missing there only.
        where = "" if place.rank == place.local_rank else f" on {socket.gethostname()}"
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _arguments() -> Any:
    parser = get_args_parser()
    args, unknown = parser.parse_known_intermixed_args()
    if unknown:
        name = unknown[0].lstrip("-").replace("-", "_")
        raise ConfigError(f"'{unknown[0]}' is not a flag; settings are written {name.partition('=')[0]}=value")
    return args


def _runner(function: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
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
            if not OmegaConf.is_missing(job.job, "num"):
                problem.write_text(f"{error or type(error).__name__}\n", encoding="utf-8")
            # In a sweep the other jobs still run, and Hydra raises the first error after them.
            if isinstance(error, UserError) and job.mode != RunMode.MULTIRUN:
                _fail(error)
            raise

    return run


def _run(root: str, conf_dir: Path, runner: Callable[[DictConfig], Any], words: Sequence[str]) -> None:
    kept, sys.argv = sys.argv, list(words)
    try:
        hydra.main(version_base="1.3", config_path=str(Path(conf_dir).absolute()), config_name=root)(runner)()
    finally:
        sys.argv = kept


@dataclass(frozen=True)
class _Command:
    """What a command line comes to."""

    words: list[str]
    """Overrides of the job, or of the sweep; Hydra's own parser wants them after the flags."""
    sweep_dir: Path | None = None
    chosen: bool = False
    """One job of a sweep, run by itself."""
    dry_run: list[DictConfig] = field(default_factory=list)
    """The configs of the jobs that are only to be told about."""
    jobs: list[list[str]] = field(default_factory=list)
    """Their words, where they are of a sweep."""


def _prepare(root: str, conf_dir: Path, args: Any, function: Callable[..., Any]) -> _Command:
    """Checks every job of the command."""
    if args.help or args.hydra_help or args.info or args.shell_completion or args.experimental_rerun:
        return _Command(args.overrides)
    if args.config_path is not None:
        conf_dir = Path(inspect.getfile(function)).parent / args.config_path
    name = detect_task_name(*detect_calling_file_or_module_from_task_function(function))
    dirs = [args.config_dir] if args.config_dir else []
    with composer(args.config_name or root, conf_dir, name, dirs, args.overrides) as opened:
        args.overrides = opened.fill_open_dicts(args.overrides)
        if args.cfg:
            opened.load(args.overrides)
            return _Command(args.overrides)
        if not args.multirun and "hydra.mode=MULTIRUN" not in args.overrides:
            cfg = opened.load(args.overrides)
            if cfg.hydra.mode != RunMode.MULTIRUN:
                with open_dict(cfg):
                    del cfg["hydra"]
                check(cfg)
                return _Command(args.overrides, dry_run=[cfg] if cfg.get("dry_run") else [])
        return _check_sweep(opened, args.overrides)


def _check_sweep(opened: Composer, words: Sequence[str]) -> _Command:
    """Composes and checks all jobs of a sweep; the command is one of them where `hydra.job.num` says which."""
    parsed = [opened.parse(word) for word in words]
    fixed = [o.input_line or "" for o in parsed if o.is_hydra_override()]
    swept = [o for o in parsed if not o.is_hydra_override()]
    try:
        master = opened.load_raw(words, RunMode.MULTIRUN).hydra
    except ConfigError:
        for job in _jobs(swept, basic=False):
            opened.load([*fixed, *job])  # says better what is misspelt
        raise
    for kind in ("launcher", "sweeper"):
        refuse_missing(kind, master[kind]._target_)
    params = master.sweeper.get("params") or {}
    swept = [opened.parse(f"{key}={value}") for key, value in params.items()] + swept
    basic = master.sweeper._target_.endswith(".BasicSweeper")
    jobs, configs = _jobs(swept, basic), []
    for index, job in enumerate(jobs):
        try:
            configs.append(_job(opened, [*fixed, *job]))
            check(configs[-1])
        except ConfigError as error:
            raise ConfigError(f"job {index + 1} of {len(jobs)} ({' '.join(job)}): {error}") from None
    if configs[0].get("dry_run"):
        if not basic:
            raise ConfigError("dry_run=true: a search decides on its jobs as it goes; describe one of them, without -m")
        return _Command(list(words), dry_run=configs, jobs=jobs)
    try:
        sweep_dir = Path(str(master.sweep.dir)).absolute()
        if OmegaConf.is_missing(master.job, "num"):
            # Hydra composes anew, and `${now:}` moves on: without this its directory could be another one.
            return _Command([*words, f"hydra.sweep.dir={quoted(master.sweep.dir)}"], sweep_dir)
        job_dir = sweep_dir / str(master.sweep.subdir)
    except OmegaConfBaseException as error:
        raise ConfigError(f"hydra.sweep.dir: {str(error).splitlines()[0]}") from None
    if not basic or master.job.num >= len(jobs):
        raise ConfigError(f"hydra.job.num={master.job.num}: the grid has {len(jobs)} jobs, numbered from 0")
    # In the words that Hydra would give this job of the whole sweep.
    job = [word for batch in BasicSweeper.split_arguments(swept, None) for word in batch[master.job.num]]
    return _Command([*fixed, *job, f"hydra.run.dir={quoted(job_dir)}"], sweep_dir, chosen=True)


def refuse_missing(kind: str, target: str) -> None:
    """Raise ConfigError for a launcher or sweeper whose package is not installed."""
    package = ".".join(target.split(".")[:2])
    if package in EXTRAS and importlib.util.find_spec(package) is None:
        extra = EXTRAS[package]
        raise ConfigError(
            f"hydra/{kind}={extra[0]} needs the extra '{extra[1]}': pip install -c constraints.txt -e '.[{extra[1]}]'"
        )


def quoted(path: Any) -> str:
    """A path as a value of an override."""
    return "'" + str(path).replace("\\", "\\\\").replace("'", "\\'") + "'"


def _jobs(overrides: list[Override], basic: bool) -> list[list[str]]:
    """The words of each job. Where a sweeper searches instead of trying all, each value once with the first others."""
    axes: dict[str, list[str]] = {}
    for override in overrides:
        axes[override.get_key_element()] = _alternatives(override)
    if basic and any(isinstance(o.value(), IntervalSweep) for o in overrides):
        raise ConfigError("interval(...) needs a sweeper that searches, such as hydra/sweeper=search")
    count = 1
    for axis in axes.values():
        count *= len(axis)
    if basic and count <= MOST_JOBS:
        return [list(job) for job in itertools.product(*axes.values())]
    first = [axis[0] for axis in axes.values()]
    return [first] + [[*first[:i], word, *first[i + 1 :]] for i, axis in enumerate(axes.values()) for word in axis[1:]]


def _alternatives(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.input_line or ""]
    if isinstance(sweep := override.value(), IntervalSweep):
        return [f"{override.get_key_element()}={end}" for end in (sweep.start, sweep.end)]
    try:
        words = [job[0] for job in BasicSweeper.split_arguments([override], None)[0]]
    except (HydraException, ValueError) as error:
        raise ConfigError(f"{override.input_line} cannot be swept: {str(error).splitlines()[0]}") from None
    if not words:
        raise ConfigError(f"{override.input_line} matches nothing to sweep over")
    return words
