"""From a root and the words of a command line to one composed config, or to one sentence on what is wrong with them.

Knows Hydra's groups, options and overrides. Must not know what a value means (`config_check`) or who asks (`config`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra import initialize_config_dir
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdft.config_check import ConfigError, did_you_mean, leaves

OVERLAYS = ("experiment", "recipe")
"""Groups whose files only set keys that others declare: a key that exists nowhere else is a mistake in them."""
TROUBLES = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, AssertionError)


@contextmanager
def composer(root: str, conf_dir: Path, job_name: str = "job", extra: Path | None = None) -> Iterator[Composer]:
    """Opens a conf directory; `extra` is one more directory searched after it."""
    conf_dir = Path(conf_dir).absolute()
    if not conf_dir.is_dir():
        raise ConfigError(f"there is no config directory {conf_dir}")
    with initialize_config_dir(str(conf_dir), job_name=job_name, version_base="1.3"):
        loader: Any = GlobalHydra.instance().config_loader()
        if extra is not None:
            loader.get_search_path().append("command-line", f"file://{Path(extra).absolute()}")
            loader.repository.initialize_sources(loader.get_search_path())
        yield Composer(root, conf_dir, loader)


@dataclass
class Composer:
    """One root in one conf directory."""

    root: str
    conf_dir: Path
    loader: Any

    def load(self, words: Sequence[str]) -> DictConfig:
        """The composed config of one job, `hydra` included, its values not looked at."""
        parsed = [self.parse(word) for word in words]
        for override in parsed:
            self._refuse_sweep(override)
            self._check_option(override)
        tree, overlays = self._declared(words)
        values = [o for o in parsed if not self._is_group(o)]
        for override in values:
            self._check_key(override, tree, words)
        for where, overlay in overlays:
            for key in _strays(overlay, tree):
                raise ConfigError(f"{where} sets '{key}': {self._unknown(key, tree, words)}")
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
        if "=" not in word and not word.startswith("~"):
            raise ConfigError(f"'{word}' is not an override{self._guess_choice(word)}")
        try:
            return OverridesParser.create(config_loader=self.loader).parse_override(word)
        except OverrideParseException as error:
            reason = error.message.splitlines()[0]
            raise ConfigError(f"cannot read '{word}': {reason}; quote it: \"key='value'\"") from None

    @cached_property
    def groups(self) -> list[str]:
        """Every group and subgroup, Hydra's own left out."""
        found, pending = [], [g for g in self.loader.repository.get_group_options("", ObjectType.GROUP) if g != "hydra"]
        while pending:
            group = pending.pop(0)
            found.append(group)
            pending += [f"{group}/{inner}" for inner in self.loader.repository.get_group_options(group, ObjectType.GROUP)]
        return found

    def options(self, group: str) -> list[str]:
        """What can be chosen for a group; files that start with `_` are for other files."""
        return [o for o in self.loader.repository.get_group_options(group, ObjectType.CONFIG) if not o.startswith("_")]

    def _is_group(self, override: Override) -> bool:
        return self.loader.repository.group_exists(override.key_or_group) and not isinstance(override.value(), dict)

    def _refuse_sweep(self, override: Override) -> None:
        if override.is_sweep_override():
            key, _, value = (override.input_line or "").partition("=")
            others = f', {key}=[{value}] for a list, "{key}=\'{value}\'" for one text' if "(" not in value else ""
            raise ConfigError(f"{override.input_line} is a sweep: add -m to sweep{others}")

    def _check_option(self, override: Override) -> None:
        group, value = override.key_or_group, override.value()
        if not self._is_group(override) or override.is_delete():
            as_group = group.replace(".", "/")
            if isinstance(value, str) and as_group in self.groups and value in self.options(as_group):
                raise ConfigError(f"{override.input_line}: '{group}' is a group; did you mean '{as_group}={value}'?")
            return
        options = self.loader.repository.get_group_options(group, ObjectType.CONFIG)
        if value is None:
            raise ConfigError(f"'{group}' has no option null; leave it out with '~{group}'")
        for option in value if isinstance(value, list) else [value]:
            if str(option) not in options:
                listed = f"Options: {', '.join(self.options(group))}"
                guess = did_you_mean(option, options) or "."
                raise ConfigError(f"'{group}' has no option '{option}'{guess} {listed}")
            if not isinstance(option, str):
                raise ConfigError(f"{override.input_line}: an option that looks like a number needs quotes")

    def _guess_choice(self, word: str) -> str:
        if word in self.groups:
            return f": write {word}=<option>. Options: {', '.join(self.options(word))}"
        choices = {option: f"{group}={option}" for group in reversed(self.groups) for option in self.options(group)}
        close = did_you_mean(word, choices)
        return f"; did you mean '{choices[close.split(chr(39))[1]]}'?" if close else ": write key=value"

    def _declared(self, words: Sequence[str]) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
        """What the chosen files say: the keys declared, and what each overlay file sets."""
        try:
            defaults = self.loader.compute_defaults_list(self.root, list(words), RunMode.RUN)
        except TROUBLES as error:
            self._explain(error, words)
        tree: dict[str, Any] = {}
        overlays = []
        for default in defaults.defaults:
            said = self._said_by(default)
            if (default.config_path or "").partition("/")[0] in OVERLAYS:
                overlays.append((f"{default.config_path}.yaml", said))
            else:
                _merge(tree, said)
        self._choices = dict(defaults.overrides.known_choices)
        return tree, overlays

    def _said_by(self, default: ResultDefault) -> dict[str, Any]:
        try:
            loaded = self.loader.repository.load_config(default.config_path)
            said = OmegaConf.to_container(loaded.config, resolve=False) if loaded else {}
        except TROUBLES as error:
            self._explain(error, [])
        if not isinstance(said, dict):
            return {}
        said.pop("defaults", None)
        for part in reversed([p for p in (default.package or "").split(".") if p]):
            said = {part: said}
        return said

    def _check_key(self, override: Override, tree: dict[str, Any], words: Sequence[str]) -> None:
        key = override.key_or_group
        if key.partition(".")[0] == "hydra" or key.startswith("hydra/"):
            return
        if override.is_add() or override.is_force_add():
            added: Any = override.value()
            for part in reversed(_parts(key)):
                added = {part: added}
            unknown = next(_strays(added, tree), None)
        else:
            unknown = None if _has(tree, key) else key
        if unknown is not None:
            raise ConfigError(self._unknown(unknown, tree, words))

    def _unknown(self, key: str, tree: dict[str, Any], words: Sequence[str]) -> str:
        """The sentence about a key that this composition does not have."""
        group, holders = self._holders(key, words)
        if holders:
            these = " and ".join(f"{group}={option}" for option in holders)
            verb = "has" if len(holders) == 1 else "have"
            return f"'{key}' means nothing with {group}={self._choices.get(group)}; {these} {verb} it"
        keys = [path for path, _ in leaves({k: v for k, v in tree.items() if k != "hydra"})]
        last = key.rpartition(".")[2].rpartition("/")[2]
        same = [k for k in keys + self.groups if re.split("[./]", k)[-1] == last]
        if same:
            return f"unknown key '{key}'; did you mean '{min(same, key=len)}'?"
        guess = did_you_mean(key, [*keys, *self.groups])
        if not guess:
            near = did_you_mean(last, ends := {re.split("[./]", k)[-1]: k for k in reversed(keys + self.groups)})
            guess = f"; did you mean '{ends[near.split(chr(39))[1]]}'?" if near else ""
        return f"unknown key '{key}'{guess or '; the top-level keys are: ' + ', '.join(k for k in tree if k != 'hydra')}"

    def _holders(self, key: str, words: Sequence[str]) -> tuple[str, list[str]]:
        """The first group with other options that would bring `key`, and those options."""
        choices = self._choices
        mine = [w for w in words if self._is_group(self.parse(w))]
        mention = re.compile(rf"\b{re.escape(re.split('[./]', key)[-1])}['\"]?\s*[:@]")
        for group in sorted(g for g in choices if g in self.groups and g not in OVERLAYS):
            files = list((self.conf_dir / group).rglob("*.yaml"))
            if not any(mention.search(file.read_text()) or "/" in key for file in files):
                continue
            others = [option for option in self.options(group) if option != choices[group]]
            holders = [option for option in others if self._brings(key, [*mine, f"{group}={option}"])]
            self._choices = choices
            if holders:
                return group, holders
        return "", []

    def _brings(self, key: str, words: list[str]) -> bool:
        try:
            return _has(self._declared(words)[0], key) if "/" not in key else bool(self._declared(words)) and (
                key in self._choices
            )
        except ConfigError:
            return False

    def _explain(self, error: Exception, words: Sequence[str]) -> NoReturn:
        """Hydra's own complaint in one sentence."""
        text = str(error) or str(error.__cause__ or type(error).__name__)
        if isinstance(error, MissingConfigException) and error.missing_cfg_file:
            group, _, option = str(error.missing_cfg_file).rpartition("/")
            where = f"'{group}' has no option '{option}', which this combination of choices asks for" if group else (
                f"there is no {option}.yaml in {self.conf_dir}"
            )
            options = self.options(group) if group else []
            listed = f" Options: {', '.join(options)}" if options else ""
            raise ConfigError(f"{where}{did_you_mean(option, options) or '.'}{listed}") from None
        if needed := re.match(r"You must specify '(.+?)'", text):
            listed = ", ".join(self.options(needed[1].partition("@")[0]))
            raise ConfigError(f"{needed[1]} is not chosen: pass {needed[1]}=... Options: {listed}") from None
        if unused := re.match(r"Could not override '(.+?)'", text):
            raise ConfigError(self._unused(unused[1], words)) from None
        if isinstance(error, yaml.YAMLError):
            raise ConfigError(f"cannot read a config file: {' '.join(text.split())}") from None
        raise ConfigError(f"{self.root}: {text.splitlines()[0]}") from None

    def _unused(self, group: str, words: Sequence[str]) -> str:
        rest = [w for w in words if self.parse(w).key_or_group != group.partition("@")[0]]
        self._declared(rest)
        by, holders = self._holders(group, rest)
        if holders:
            return f"'{group}' means nothing with {by}={self._choices.get(by)}; {by}={holders[0]} has it"
        own = sorted(g for g in self._choices if not g.startswith("hydra"))
        return f"'{group}' is not part of '{self.root}'. Its groups: {', '.join(own)}"


def _parts(key: str) -> list[str]:
    return [part for part in re.split(r"[.\[\]]+", key) if part]


def _has(tree: Any, key: str) -> bool:
    """Whether the key exists; what lies inside a scalar or an interpolation is Hydra's to judge."""
    for part in _parts(key):
        if isinstance(tree, list):
            if not part.isdigit() or int(part) >= len(tree):
                return False
            tree = tree[int(part)]
        elif isinstance(tree, dict):
            if part not in tree:
                return False
            tree = tree[part]
        else:
            return isinstance(tree, str) and "${" in tree
    return True


def _merge(tree: dict[str, Any], said: dict[str, Any]) -> None:
    for key, value in said.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _strays(said: dict[Any, Any], tree: Any, path: str = "") -> Iterator[str]:
    """Keys that nobody declares; inside a `_target_` node they are arguments, which `check` binds."""
    if not isinstance(tree, dict) or (path and not tree) or "_target_" in tree or "_target_" in said:
        return
    for key, value in said.items():
        if key == "hydra" and not path:
            continue
        inner = f"{path}.{key}" if path else str(key)
        if key in tree:
            if isinstance(value, dict):
                yield from _strays(value, tree[key], inner)
        elif not (path and isinstance(value, dict) and "_target_" in value):
            yield inner
