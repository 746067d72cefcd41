"""From a root and the words of a command line to one composed config, or to one sentence on what is wrong with them.

Knows Hydra's groups, options and overrides. Must not know what a value means (`config_check`) or who asks (`config`).
"""

from __future__ import annotations

import copy
import importlib.resources
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra import initialize_config_dir
from hydra._internal.config_repository import CachingConfigRepository
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdft.config.keys import (
    ConfigError,
    at,
    closest,
    did_you_mean,
    dotted,
    has,
    items,
    leaf,
    merge,
    nearest,
    nest,
    split,
    strays,
)

OVERLAYS = ("experiment", "recipe")
"""Groups whose files only set keys that others declare: a key that exists nowhere else is a mistake in them."""
TROUBLES = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, AssertionError)


@contextmanager
def composer(
    root: str, conf_dir: Path, job_name: str = "job", config_dirs: Sequence[str | Path] = (), words: Sequence[str] = ()
) -> Iterator[Composer]:
    """Opens a conf directory and what is searched besides it.

    config_dirs: further folders, as of `--config-dir`. words: the overrides of the command; folders and packages that
    `hydra.searchpath` lists there, or in the root file, are searched too.
    """
    conf_dir = Path(conf_dir).absolute()
    if not conf_dir.is_dir():
        raise ConfigError(f"there is no config directory {conf_dir}")
    with initialize_config_dir(str(conf_dir), job_name=job_name, version_base="1.3"):
        loader: Any = GlobalHydra.instance().config_loader()
        folders = [conf_dir]
        listed = searchpath(conf_dir / f"{root}.yaml", words)
        for provider, paths in (("command-line", config_dirs), ("hydra.searchpath in command-line", listed)):
            for path in map(str, paths):
                folders.append(folder_of(path))
                place = path if "://" in path else f"file://{Path(path).absolute()}"
                # Hydra insists that the structured configs come last.
                loader.get_search_path().prepend(provider, place, anchor="schema")
        if len(folders) > 1:
            loader.repository.initialize_sources(loader.get_search_path())
        loader.repository = _Files(loader.repository)
        yield Composer(root, conf_dir, loader, folders)


def searchpath(root_file: Path, words: Sequence[str]) -> list[str]:
    """What `hydra.searchpath` lists: in the overrides, else in the root file."""
    for word in words:
        if word.lstrip("+").startswith("hydra.searchpath="):
            try:
                found = OverridesParser.create().parse_override(word).value()
            except HydraException:
                found = None
            if not isinstance(found, list) or not all(isinstance(path, str) for path in found):
                raise ConfigError(f"{word}: must be a list, as hydra.searchpath=[file://DIR] or [pkg://my_lab.conf]")
            return [str(path) for path in found]
    said = OmegaConf.load(root_file) if root_file.is_file() else OmegaConf.create()
    return list(OmegaConf.select(said, "hydra.searchpath") or []) if isinstance(said, DictConfig) else []


def folder_of(path: str) -> Path:
    """The folder of a search path entry. Raises ConfigError where there is none."""
    scheme, _, name = path.rpartition("://")
    if scheme == "pkg":
        package = name.replace("/", ".")
        try:
            folder = Path(str(importlib.resources.files(package)))
        except (ImportError, TypeError, ValueError):
            remedy = "install it, or set PYTHONPATH"
            raise ConfigError(f"hydra.searchpath: Python cannot import '{package}'; {remedy}") from None
        if not (folder / "__init__.py").is_file():
            raise ConfigError(f"hydra.searchpath: the package '{package}' needs an __init__.py, which Hydra asks for")
        return folder
    if scheme not in ("", "file"):
        raise ConfigError(f"hydra.searchpath: '{path}' must begin with file:// or pkg://")
    if not Path(name).is_dir():
        raise ConfigError(f"there is no config directory {name}")
    return Path(name)


class _Files(CachingConfigRepository):
    """Each YAML file is read once for all jobs of a command: reading is most of the time of composing."""

    def load_config(self, config_path: str) -> ConfigResult | None:
        return copy.deepcopy(super().load_config(config_path))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Files:
        return self  # Hydra copies the repository for every composition


@dataclass(frozen=True)
class Declared:
    """What the chosen files say, before any value is overridden."""

    tree: dict[str, Any]
    """The keys that exist, overlays aside."""
    overlays: list[tuple[str, dict[str, Any]]]
    """File and content of each overlay."""
    choices: dict[str, Any]
    """Group -> chosen option."""


@dataclass
class Composer:
    """One root in one conf directory."""

    root: str
    conf_dir: Path
    loader: Any
    folders: list[Path]
    """All that is searched for YAML files."""

    def load(self, words: Sequence[str]) -> DictConfig:
        """The composed config of one job, `hydra` included, its values not looked at."""
        parsed = [self.parse(word) for word in words]
        for override in parsed:
            self._refuse_sweep(override)
            self._check_option(override)
        declared = self._declared(words)
        for override in parsed:
            if not self._is_group(override) and not override.is_hydra_override():
                self._check_key(override, declared, words)
        for where, overlay in declared.overlays:
            for key in strays(overlay, declared.tree):
                raise ConfigError(f"{where} sets '{key}': {self._unknown(key, declared, words)}")
        return self.load_raw(words)

    def load_raw(self, words: Sequence[str], mode: RunMode = RunMode.RUN) -> DictConfig:
        """The same without any question but Hydra's own; in MULTIRUN mode sweeps are left out."""
        try:
            return self.loader.load_configuration(
                self.root, list(words), run_mode=mode, validate_sweep_overrides=mode == RunMode.RUN
            )
        except TROUBLES as error:
            self._explain(error, words)

    def parse(self, word: str) -> Override:
        """One override; its globs are expanded against this conf directory."""
        if word.startswith("=") or ("=" not in word and not word.startswith("~")):
            raise ConfigError(f"'{word}' is not an override{self._guess_choice(word)}")
        try:
            return OverridesParser.create(config_loader=self.loader).parse_overrides([word])[0]
        except HydraException as error:
            lines = [line for line in str(getattr(error, "message", error)).splitlines() if "hydra.cc" not in line]
            if lines[0].startswith(("LexerNoViableAlt", "token recognition")):
                lines[0] = "it holds a character that needs quotes"
            reason = lines[1] if lines[0].startswith("Error parsing") else lines[0]
            raise ConfigError(f"cannot read '{word}': {reason}; text is quoted as \"key='text'\"") from None

    def fill_open_dicts(self, words: Sequence[str]) -> list[str]:
        """The words with `key={...}` as `++key={...}` where the key is declared as `{}`, for the user to fill.

        Hydra merges dicts, and refuses keys that are new. Raises ConfigError where an experiment or recipe has filled it
        already, since the result would have the entries of both.
        """
        parsed = [self.parse(word) for word in words]
        filled = [o for o in parsed if o.type == OverrideType.CHANGE and isinstance(o.value(), dict) and o.value()]
        if not filled:
            return list(words)
        chosen = [o.input_line or "" for o in parsed if self._is_group(o) and not o.is_sweep_override()]
        declared = self._declared(chosen)
        found = list(words)
        for override in filled:
            key = override.key_or_group
            if at(declared.tree, key) != {} or not has(declared.tree, key):
                continue
            for where, overlay in declared.overlays:
                if entries := at(overlay, key):
                    known = ", ".join(map(str, entries))
                    raise ConfigError(f"{key} has entries already ({known}, from {where}): ++{key}=... adds to them")
            found[parsed.index(override)] = f"++{override.input_line}"
        return found

    @cached_property
    def groups(self) -> list[str]:
        """Every group and subgroup, Hydra's own left out."""
        found: list[str] = []
        pending = [group for group in self._listed("", ObjectType.GROUP) if group != "hydra"]
        while pending:
            found.append(group := pending.pop(0))
            pending += [f"{group}/{inner}" for inner in self._listed(group, ObjectType.GROUP)]
        return found

    def options(self, group: str) -> list[str]:
        """What can be chosen for a group; files that start with `_` are for other files."""
        return [option for option in self._listed(group, ObjectType.CONFIG) if not option.startswith("_")]

    def _listed(self, group: str, kind: ObjectType) -> list[str]:
        return self.loader.repository.get_group_options(group, kind)

    def _is_group(self, override: Override) -> bool:
        return self.loader.repository.group_exists(override.key_or_group) and not isinstance(override.value(), dict)

    def _refuse_sweep(self, override: Override) -> None:
        if override.is_sweep_override():
            key, _, value = (override.input_line or "").partition("=")
            others = "" if "(" in value else f" (or write {key}=[{value}] for a list)"
            raise ConfigError(f"{override.input_line} is a sweep: add -m to sweep{others}")

    def _check_option(self, override: Override) -> None:
        group, value = override.key_or_group, override.value()
        if not self._is_group(override) or override.is_delete():
            as_group = group.replace(".", "/")
            if as_group in self.groups and value in self.options(as_group):
                raise ConfigError(f"{override.input_line}: '{group}' is a group; did you mean '{as_group}={value}'?")
            return
        if value is None:
            raise ConfigError(f"'{group}' has no option null; '~{group}' leaves it out")
        options = self._listed(group, ObjectType.CONFIG)
        for option in value if isinstance(value, list) else [value]:
            if str(option) not in options:
                guess = did_you_mean(option, options) or "."
                raise ConfigError(f"'{group}' has no option '{option}'{guess}{self._menu(group)}")
            if not isinstance(option, str):
                raise ConfigError(f"{override.input_line}: quote an option that is a number, {group}=\"'{option}'\"")

    def _menu(self, group: str) -> str:
        options = self.options(group)
        return f" Options: {', '.join(options)}" if options else ""

    def _guess_choice(self, word: str) -> str:
        if word in self.groups:
            return f": write {word}=<option>.{self._menu(word)}"
        choices = {option: f"{group}={option}" for group in reversed(self.groups) for option in self.options(group)}
        guess = closest(word, choices)
        return f"; did you mean '{choices[guess]}'?" if guess else ": write key=value"

    def _declared(self, words: Sequence[str]) -> Declared:
        try:
            defaults = self.loader.compute_defaults_list(self.root, list(words), RunMode.RUN)
        except TROUBLES as error:
            self._explain(error, words)
        declared = Declared({}, [], dict(defaults.overrides.known_choices))
        # A file that the command adds may fill what the root declares, not bring what nobody reads.
        added = {o.key_or_group for o in map(self.parse, words) if o.is_add() and self._is_group(o)}
        for default in defaults.defaults:
            path = default.config_path or ""
            if path.startswith("hydra/"):
                continue
            said = self._said_by(default)
            if path.partition("/")[0] in OVERLAYS or path.rpartition("/")[0] in added:
                declared.overlays.append((f"{path}.yaml", said))
            else:
                merge(declared.tree, said)
        declared.tree.pop("hydra", None)
        return declared

    def _said_by(self, default: ResultDefault) -> dict[str, Any]:
        try:
            loaded = self.loader.repository.load_config(default.config_path)
            said = OmegaConf.to_container(loaded.config, resolve=False) if loaded else {}
        except TROUBLES as error:
            self._explain(error, ())
        if not isinstance(said, dict):
            return {}
        said.pop("defaults", None)
        return nest(split(default.package or ""), said)

    def _check_key(self, override: Override, declared: Declared, words: Sequence[str]) -> None:
        key = override.key_or_group
        if override.is_add() or override.is_force_add():
            unknown = next(strays(nest(split(key), override.value()), declared.tree), None)
        else:
            # A stray of an overlay is that file's mistake, not the command's.
            trees = [declared.tree, *(overlay for _, overlay in declared.overlays)]
            is_dict = isinstance(override.value(), dict) and items(at(declared.tree, key))
            keys = [key, *(dotted(override.value(), key) if is_dict else ())]
            unknown = next((k for k in keys if not any(has(tree, k) for tree in trees)), None)
        if unknown is not None:
            raise ConfigError(self._unknown(unknown, declared, words))

    def _unknown(self, key: str, declared: Declared, words: Sequence[str]) -> str:
        """The sentence about a key that this composition does not have."""
        if elsewhere := self._elsewhere(key, declared, words):
            return elsewhere
        return f"unknown key '{key}'{nearest(key, declared.tree, self.groups)}"

    def _elsewhere(self, key: str, declared: Declared, words: Sequence[str]) -> str | None:
        """The sentence about a key, or a group, that other options of some group would bring."""
        mine = [word for word in words if self._is_group(self.parse(word))]
        mention = re.compile(rf"\b{re.escape(leaf(key))}['\"]?\s*[:@]")
        for group in sorted(g for g in declared.choices if g in self.groups and g not in OVERLAYS):
            # Composing is slow; most groups never speak of the key.
            if not any(mention.search(file.read_text()) for file in self._files(group)):
                continue
            chosen = declared.choices[group]
            others = [option for option in self.options(group) if option != chosen]
            if holders := [f"{group}={o}" for o in others if self._brings(key, [*mine, f"{group}={o}"])]:
                verb = "has" if len(holders) == 1 else "have"
                return f"'{key}' means nothing with {group}={chosen}; {' and '.join(holders)} {verb} it"
        return None

    def _files(self, group: str) -> Iterator[Path]:
        return (file for folder in self.folders for file in (folder / group).rglob("*.yaml"))

    def _brings(self, key: str, words: list[str]) -> bool:
        try:
            declared = self._declared(words)
        except ConfigError:
            return False
        return key in declared.choices or has(declared.tree, key)

    def _explain(self, error: Exception, words: Sequence[str]) -> NoReturn:
        """Hydra's own complaint in one sentence."""
        text = str(error) or str(error.__cause__ or type(error).__name__)
        if isinstance(error, MissingConfigException) and error.missing_cfg_file:
            raise ConfigError(self._no_file(str(error.missing_cfg_file))) from None
        if needed := re.match(r"You must specify '(.+?)'", text):
            raise ConfigError(f"{needed[1]} is not chosen: pass {needed[1]}=...{self._menu(needed[1])}") from None
        unused = re.match(r"Could not override '(.+?)'", text)
        for override in map(self.parse, words if unused else ()):
            if unused and override.get_key_element() == unused[1]:
                named = self._unused(unused[1], words) if self._is_group(override) else f"unknown key '{unused[1]}'"
                raise ConfigError(named) from None
        if isinstance(error, yaml.YAMLError):
            raise ConfigError(f"cannot read a config file: {' '.join(text.split())}") from None
        raise ConfigError(f"{self.root}: {text.splitlines()[0]}") from None

    def _no_file(self, path: str) -> str:
        group, _, option = path.rpartition("/")
        if not group:
            return f"there is no {option}.yaml in {self.conf_dir}{did_you_mean(option, self.options(''))}"
        guess = did_you_mean(option, self.options(group)) or "."
        return f"'{group}' has no option '{option}', which this combination asks for{guess}{self._menu(group)}"

    def _unused(self, group: str, words: Sequence[str]) -> str:
        """The sentence about a group that exists and that this composition does not use."""
        rest = [word for word in words if self.parse(word).get_key_element() != group]
        declared = self._declared(rest)
        used = sorted(g for g in declared.choices if not g.startswith("hydra"))
        elsewhere = self._elsewhere(group, declared, rest)
        return elsewhere or f"'{group}' is not part of '{self.root}'. Its groups: {', '.join(used)}"
