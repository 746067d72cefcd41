"""Composes the config of one job with Hydra, and explains in one sentence what Hydra refuses.

The only file that uses Hydra's internals, each with its reason. Does not know what a value means (`check`).
"""

from __future__ import annotations

import copy
import importlib.resources
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra import initialize_config_dir
from hydra._internal.config_repository import CachingConfigRepository
from hydra._internal.core_plugins import basic_sweeper  # whose class the search for plugins replaces by an equal one
from hydra._internal.utils import get_args_parser  # tells overrides from Hydra's flags; `command` uses it
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sdft.config.keys import ConfigError, flatten, leaf, nearest, undeclared
from sdft.errors import closest, did_you_mean

__all__ = ["Composer", "basic_sweeper", "composer", "get_args_parser"]
OVERLAYS = ("experiment", "recipe")
"""Groups whose files only set keys that others declare: a key that exists nowhere else is a mistake in them."""
OmegaConf.register_new_resolver("times", lambda *factors: float(f"{math.prod(map(float, factors)):.12g}"), replace=True)


@contextmanager
def composer(
    root: str, conf_dir: Path, overrides: Sequence[str], config_dirs: Sequence[str | Path] = (), job_name: str = "job"
) -> Iterator[Composer]:
    """Open a conf directory, `config_dirs`, and the places of `hydra.searchpath` in the overrides or the root file.

    Raises ConfigError for a place that does not exist.
    """
    with initialize_config_dir(str(Path(conf_dir).absolute()), job_name, version_base="1.3"):
        opened = Composer(root, GlobalHydra.instance().config_loader())
        loader = opened.loader
        for folder in config_dirs:
            place = f"file://{Path(folder).absolute()}"
            loader.get_search_path().prepend("command-line", place, anchor="schema")  # which must be the last
        loader.repository.initialize_sources(loader.get_search_path())
        parsed = opened.parse(overrides)
        with opened.explained(parsed), warnings.catch_warnings(action="ignore"):
            # Private: Hydra adds these places inside of each composition, and we need their groups before the first.
            loader._process_config_searchpath(root, parsed, loader.repository)
        for source in loader.get_sources():
            if not source.available() and source.scheme() == "pkg":
                what = f"Python cannot import '{source.path}' as a package with an __init__.py"
                raise ConfigError(f"hydra.searchpath: {what}; install it, or set PYTHONPATH")
            if not source.available():
                raise ConfigError(f"there is no config directory {source.path}")
        loader.repository = _Files(loader.repository)
        yield opened


class _Files(CachingConfigRepository):
    """Reads each YAML file once for all jobs of a command. Internal: Hydra's own cache lasts for one composition."""

    def load_config(self, config_path: str) -> Any:
        return copy.deepcopy(super().load_config(config_path))

    def initialize_sources(self, config_search_path: Any) -> None:
        """Nothing: the sources are the same for all jobs."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Files:
        return self  # Hydra copies the repository for each composition


class Declared(NamedTuple):
    """What the chosen files contain, as flat trees, before any value is overridden."""

    tree: dict[str, Any]  # overlays aside
    overlays: dict[str, dict[str, Any]]  # file -> content
    choices: dict[str, Any]  # group -> chosen option


@dataclass
class Composer:
    """One root file of a conf directory."""

    root: str
    loader: Any
    _declared: dict[tuple[str, ...], Declared] = field(default_factory=dict)

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """The overrides as objects; their globs match options of this conf directory."""
        for text in overrides:
            if text.startswith("=") or ("=" not in text and not text.startswith("~")):
                if text in self.options:
                    raise ConfigError(f"'{text}' is not an override: write {text}=<option>. {self._menu(text)}")
                choices = {o: f"{group}={o}" for group, options in self.options.items() for o in options}
                guess = closest(text, choices)
                remedy = f"; did you mean '{choices[guess]}'?" if guess else ": write key=value"
                raise ConfigError(f"'{text}' is not an override{remedy}")
        try:
            return OverridesParser.create(config_loader=self.loader).parse_overrides(list(overrides))
        except HydraException as error:
            first, second, *_ = [*str(error).splitlines(), ""]
            reason = second if first.startswith("Error parsing") else first
            if reason.startswith(("LexerNoViableAlt", "token recognition")):
                reason = "it holds a character that needs quotes"
            text = f"cannot read '{error.override}': {reason}; text is quoted as \"key='text'\""  # type: ignore
            raise ConfigError(text) from None

    def load(self, overrides: Sequence[str]) -> tuple[DictConfig, DictConfig]:
        """The composed config of one job, its values not checked, and its Hydra node."""
        parsed = self.parse(overrides)
        for override in parsed:
            self._check_choice(override)
        declared = self._declare(parsed)
        added = [o for o in parsed if (o.is_add() or o.is_force_add()) and not self._is_group(o)]
        for override in (override for override in added if not override.is_hydra_override()):
            parts = reversed(override.key_or_group.split("."))
            for key in undeclared(flatten(reduce(lambda v, part: {part: v}, parts, override.value())), declared.tree):
                raise ConfigError(self._unknown(key, parsed))
        for file, content in declared.overlays.items():
            for key in undeclared(content, declared.tree):
                raise ConfigError(f"{file} sets '{key}': {self._unknown(key, parsed)}")
        cfg = self.load_unchecked(parsed)
        with open_dict(cfg):
            return cfg, cfg.pop("hydra")

    def load_unchecked(self, overrides: Sequence[Override], mode: RunMode = RunMode.RUN) -> DictConfig:
        """The config with its Hydra node, after Hydra's own checks; in MULTIRUN mode sweeps are left out."""
        with self.explained(overrides):
            return self.loader.load_configuration(self.root, [o.input_line for o in overrides], run_mode=mode)

    def jobs(self, overrides: Sequence[Override], is_grid: bool) -> list[list[str]]:
        """The overrides of each job of a grid; of a search, each value once with the first of the others."""
        # Internal: jobs are numbered, and their overrides written, as Hydra does it.
        split = basic_sweeper.BasicSweeper.split_arguments
        for override in overrides:
            if override.is_discrete_sweep() and not list(override.sweep_iterator()):
                raise ConfigError(f"{override.input_line} matches nothing to sweep over")
            if override.is_interval_sweep() and is_grid:
                raise ConfigError("interval(...) needs a sweeper that searches, such as hydra/sweeper=search")
        if is_grid:
            return split(list(overrides), None)[0]
        axes = {}
        for override in overrides:
            key, sweep = override.get_key_element(), override.value()
            ends = [f"{key}={end}" for end in (sweep.start, sweep.end)] if isinstance(sweep, IntervalSweep) else None
            axes[key] = ends or [job[0] for job in split([override], None)[0]]
        first = {key: axis[0] for key, axis in axes.items()}
        jobs = dict.fromkeys(tuple((first | {key: value}).values()) for key in axes for value in axes[key])
        return [list(job) for job in jobs or [()]]

    def fill_open_dicts(self, overrides: Sequence[str]) -> list[str]:
        """The overrides as Hydra takes them: `hardware=auto` as the preset of this machine's GPU, and `key={...}` or
        `key.entry=...` with `++` before it if the key is declared as `{}`, for the user to fill.

        Hydra merges dicts, and refuses new keys. Raises ConfigError if an experiment or recipe has filled it already,
        since the result would have the entries of both.
        """
        filled = with_found_hardware(overrides)
        parsed = self.parse(filled)
        for number, override in enumerate(parsed):
            key, value = override.key_or_group, override.value()
            if override.type != OverrideType.CHANGE or self._is_group(override):
                continue
            declared = self._declare(parsed)
            above = [key[: dot.start()] for dot in re.finditer(r"\.", key)]
            if any(declared.tree.get(parent) == {} for parent in above):
                filled[number] = f"++{override.input_line}"
            elif isinstance(value, dict) and value and declared.tree.get(key) == {}:
                filled[number] = f"++{override.input_line}"
                for file, content in declared.overlays.items():
                    if found := ", ".join(map(str, content.get(key) or ())):
                        raise ConfigError(f"{key} has entries already ({found}, from {file}): ++{key}=... adds to them")
        return filled

    def _declare(self, overrides: Sequence[Override]) -> Declared:
        """What the files contain that these overrides choose; found once for all jobs that differ in values only."""
        chosen = [override for override in overrides if self._is_group(override)]
        for override in chosen:
            self._check_option(override)
        lines = tuple(str(override.input_line) for override in chosen)
        if lines not in self._declared:
            # A file that the command adds may fill what the root declares, but not add keys that nobody reads.
            added = [(override.key_or_group, override.package) for override in chosen if override.is_add()]
            with self.explained(chosen):
                found = self.loader.compute_defaults_list(self.root, list(lines), RunMode.RUN)
                files = [file for file in found.defaults if not file.config_path.startswith("hydra/")]
                above = [file for file in files if lies_above(file, added)]
                tree = self._content([file for file in files if file not in above])
                contents = {f"{file.config_path}.yaml": self._content([file]) for file in above}
                self._declared[lines] = Declared(tree, contents, dict(found.overrides.known_choices))
        return self._declared[lines]

    def _content(self, files: list[Any]) -> dict[str, Any]:
        # Private: the public load_configuration composes all files of a root, and overrides values.
        merged = self.loader._compose_config_from_defaults_list(files, self.loader.repository)
        merged.pop("hydra", None)
        return flatten(OmegaConf.to_container(merged, resolve=False))

    @cached_property
    def options(self) -> dict[str, list[str]]:
        """Group -> its options; files that start with `_` are for other files. Hydra's own groups come last."""
        groups = sorted(self.loader.list_groups(""), key="hydra".__eq__)
        for group in groups:  # which grows by the subgroups
            groups += [f"{group}/{inner}" for inner in self.loader.list_groups(group)]
        return {group: [o for o in self.loader.get_group_options(group) if not o.startswith("_")] for group in groups}

    def _is_group(self, override: Override) -> bool:
        return self.loader.repository.group_exists(override.key_or_group) and not isinstance(override.value(), dict)

    def _check_choice(self, override: Override) -> None:
        """Raises ConfigError for a sweep, and for a group that is written as a key."""
        group, value, line = override.key_or_group, override.value(), str(override.input_line)
        if override.is_sweep_override():
            or_list = "" if "(" in line else f" (or write {line.replace('=', '=[', 1)}] for a list)"
            raise ConfigError(f"{line} is a sweep: add -m to sweep{or_list}")
        if not self._is_group(override):
            as_group = group.replace(".", "/")
            if self.loader.repository.group_exists(as_group) and value in self.options[as_group]:
                raise ConfigError(f"{line}: '{group}' is a group; did you mean '{as_group}={value}'?")

    def _check_option(self, override: Override) -> None:
        """Raises ConfigError for what cannot be an option of the group of an override."""
        group, value = override.key_or_group, override.value()
        if "none" in self.options[group] and (override.is_delete() or value is None):
            raise ConfigError(f"{override.input_line}: write {group}=none")
        if value is None and not override.is_delete():
            raise ConfigError(f"'{group}' has no option null; '~{group}' leaves it out")
        if value is not None and not isinstance(value, str | list) and not override.is_sweep_override():
            raise ConfigError(self._no_option(group, value))

    def _no_option(self, group: str, option: object, who: str = "") -> str:
        guess = did_you_mean(option, self.options[group]) or "."
        return f"'{group}' has no option '{option}'{who}{guess} {self._menu(group)}"

    def _menu(self, group: str) -> str:
        return f"Options: {', '.join(self.options[group])}"

    @contextmanager
    def explained(self, overrides: Sequence[Override]) -> Iterator[None]:
        """Turns an error of Hydra into a ConfigError of one sentence."""
        try:
            yield
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, AssertionError) as error:
            raise ConfigError(self._explanation(error, overrides)) from None

    def _explanation(self, error: Exception, overrides: Sequence[Override]) -> str:
        text = str(error) or str(error.__cause__ or type(error).__name__)
        if isinstance(error, MissingConfigException) and error.missing_cfg_file:
            group, _, name = str(error.missing_cfg_file).rpartition("/")
            if not group:
                guess = did_you_mean(name, self.loader.get_group_options(""))
                return f"there is no {name}.yaml in {self.loader.get_sources()[1].path}{guess}"
            is_chosen = any(o.key_or_group == group and name in str(o.value()) for o in overrides)
            return self._no_option(group, name, "" if is_chosen else ", which this combination asks for")
        if needed := re.match(r"You must specify '(.+?)'", text):
            return f"{needed[1]} is not chosen: pass {needed[1]}=... {self._menu(needed[1])}"
        if unused := re.match(r"Could not (?:override|delete from config\.|delete) '(.+?)'", text):
            inner = error.__cause__.full_key if isinstance(error.__cause__, OmegaConfBaseException) else ""
            return self._unknown(max(unused[1], inner or "", key=len), overrides)
        if text.startswith(("hydra.searchpath must be", "No config source registered")):
            return "hydra.searchpath: must be a list, and each place in it must begin with file:// or pkg://"
        what = "cannot read a config file" if isinstance(error, yaml.YAMLError) else self.root
        return f"{what}: {' '.join(text.split()) if isinstance(error, yaml.YAMLError) else text.splitlines()[0]}"

    def _unknown(self, key: str, overrides: Sequence[Override]) -> str:
        """The sentence about a key, or a group, that this composition does not have."""
        others = [override for override in overrides if override.get_key_element() != key]
        declared = self._declare(others)
        used = {group: option for group, option in declared.choices.items() if not group.startswith("hydra/")}
        for group in sorted((used.keys() & self.options.keys()) - set(OVERLAYS)):
            # Composing is slow, and most options never mention the key.
            mentions = self._options_that_mention(group, key)
            choices = [f"{group}={option}" for option in mentions if option != used[group]]
            if holders := [choice for choice in choices if self._brings(key, [*others, *self.parse([choice])])]:
                have = "has" if len(holders) == 1 else "have"
                return f"'{key}' means nothing with {group}={used[group]}; {' and '.join(holders)} {have} it"
        if key in self.options and len(others) < len(overrides):
            return f"'{key}' is not part of '{self.root}'. Its groups: {', '.join(sorted(used))}"
        return f"unknown key '{key}'{'' if key.startswith('hydra.') else nearest(key, declared.tree, self.options)}"

    def _options_that_mention(self, group: str, key: str) -> list[str]:
        """The options of a group that may bring a key: files of the group have all names of its path that the group
        does not stand for itself, and so has the option's, or it builds on others."""
        wanted = [name for name in re.split(r"[./@]", key) if name not in group.split("/")] or [leaf(key)]
        # As a key, or as a part of the file's package.
        mention = r"\b{0}['\"]?\s*[:@]|@package [\w.]*\b{0}\b"
        names = [re.compile(mention.format(re.escape(name))) for name in wanted]
        texts = dict.fromkeys(self.options[group], "")
        for source in self.loader.get_sources():
            if source.scheme() in ("file", "pkg"):
                folder = source.path if source.scheme() == "file" else importlib.resources.files(source.path)
                for file in (Path(str(folder)) / group).rglob("*.yaml"):
                    texts[file.stem] = texts.get(file.stem, "") + file.read_text()
        if not all(any(name.search(text) for text in texts.values()) for name in names):
            return []
        builds = re.compile(r"^defaults:", re.MULTILINE)
        return [o for o in self.options[group] if builds.search(texts[o]) or all(n.search(texts[o]) for n in names)]

    def _brings(self, key: str, overrides: Sequence[Override]) -> bool:
        try:
            declared = self._declare(overrides)
        except ConfigError:
            return False
        return key in declared.choices or key in declared.tree


def lies_above(file: Any, added: Sequence[tuple[str, str | None]]) -> bool:
    """Whether a file of a defaults list fills what others declare: an experiment, or one that the command adds.

    added: groups that the command adds, with the package that it says. `+lr_schedule@part_schedules.words=constant`
    adds that one, and not the `lr_schedule` of the root.
    """
    group = file.config_path.rpartition("/")[0]
    return group in OVERLAYS or any(group == name and package in (None, file.package) for name, package in added)


def with_found_hardware(overrides: Sequence[str]) -> list[str]:
    """The overrides with the preset of this machine's GPU for `hardware=auto`, so that receipts have its name."""
    if "hardware=auto" not in overrides:
        return list(overrides)
    from sdft.hardware import found_preset

    found = found_preset() or "auto"
    return [f"hardware={found}" if override == "hardware=auto" else override for override in overrides]
