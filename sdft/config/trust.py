"""Configs that come from files: what they may name, so that a file from a stranger runs nothing.

Run folders, receipts, sweeps and recipes are passed between people. The command line is trusted, and so are the config
folders that it names. A config that is read from a file may name only the targets of `conf/`, optimizers of torch,
schedulers of diffusers, and classes of the packages in `trust=`; it may not run commands, open pickles or read the
environment unless `trust=commands`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdft.config.command import CONF_DIR, ConfigError
from sdft.config.keys import items, join
from sdft.config.moved import current_name, rename_targets
from sdft.errors import UserError

COMMANDS = "commands"
"""The word in `trust=` that allows `pipe:` shards, pickles and interpolations that call resolvers."""
MAX_VALUES = 100_000
"""Of a file, aliases expanded: more is an alias bomb."""
KINDS = ("map", "seq", "str", "int", "float", "bool", "null", "timestamp")
PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in KINDS}
HARMLESS = re.compile(r"\$\{(now:[^$}]*|oc\.select:[^$}]*|times:[^$}]*|[.\w\[\]]+)\}")
"""Interpolations of other keys, with a default or without, of the time, and of products of numbers."""


def read_config(file: Path, trust: Sequence[str] = ()) -> DictConfig:
    """The config of a run, such as its `.hydra/config.yaml`, with today's names of classes.

    Raises ConfigError if it cannot be read, is not a config, or has anything that is not trusted.
    """
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: is not the config of a run")
    content = rename_targets(content)
    refuse_untrusted(content, str(file), trust, partial(line_of_key, file))
    return OmegaConf.create(content)


def read_yaml(file: Path, where: str = "") -> Any:
    """The content of a YAML file as plain values, interpolations not resolved.

    where: how messages name the file, by default its path.
    Raises ConfigError if it cannot be read, and for tags and aliases that expand beyond MAX_VALUES.
    """
    where = where or str(file)
    try:
        text = file.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if _num_values(node, {}) > MAX_VALUES:
            raise ConfigError(f"{where}: has aliases that expand to more than {MAX_VALUES:,} values; do not use it")
        if not isinstance(node, yaml.CollectionNode):
            return yaml.safe_load(text)
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (OSError, yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        reason = error.strerror or reason if isinstance(error, OSError) else reason
        raise ConfigError(f"{where}: cannot be read ({reason})") from error


def line_of_key(file: Path, key: str) -> int | None:
    """The line of a YAML file in which a dotted key is set, counted from 1; None if it has no such key."""
    node, line = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), None
    while key:
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = children if isinstance(node, yaml.MappingNode) else enumerate(children)
        for name, child in pairs:
            text = str(name.value if isinstance(name, yaml.Node) else name)
            if key == text or key.startswith(f"{text}."):
                start = name if isinstance(name, yaml.Node) else child
                node, line, key = child, start.start_mark.line + 1, key[len(text) + 1 :]
                break
        else:
            return line
    return line


def line_of_override(file: Path, text: str) -> int | None:
    """The line of a receipt in which an override is recorded, counted from 1."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((number for number, line in enumerate(lines, 1) if json.dumps(text) in line), None)


def _num_values(node: Any, known: dict[int, int]) -> int:
    """How many values a YAML node expands to. Raises ConfigError for a tag, or for an alias inside of itself."""
    if node is None:
        return 0
    if id(node) in known:
        return known[id(node)]
    if node.tag not in PLAIN_TAGS:
        raise yaml.YAMLError(f"the tag {node.tag} in line {node.start_mark.line + 1} is not allowed")
    known[id(node)] = MAX_VALUES + 1  # of an alias inside of itself
    children = node.value if isinstance(node.value, list) else []
    flat = [one for child in children for one in (child if isinstance(child, tuple) else [child])]
    known[id(node)] = 1 + sum(_num_values(child, known) for child in flat)
    return known[id(node)]


def as_packages(trust: str | Sequence[str] | None) -> list[str]:
    """The value of `trust=` as a list."""
    return [trust] if isinstance(trust, str) else [str(name) for name in trust or ()]


def trusted_by(overrides: Sequence[str]) -> list[str]:
    """The packages in `trust=` of a command line."""
    found: list[str] = []
    for text in overrides:
        if text.startswith("trust="):
            found = as_packages(_parsed(text, "the command line").value())
    return found


def refuse_untrusted_overrides(overrides: Sequence[str], file: Path, trust: Sequence[str] = ()) -> None:
    """Raise ConfigError for an override recorded in a receipt that is not trusted; see `refuse_untrusted`."""
    for text in overrides:
        line = line_of_override(file, text)
        where = f"reproduce: {file}" + (f", line {line}" if line else "")
        override = _parsed(text, where)
        key = override.key_or_group
        if key.partition("/")[0].partition(".")[0] == "hydra":
            raise ConfigError(f"{where} sets {key}: settings of Hydra are not taken from a file; pass them yourself")
        tree: Any = override.value()
        for part in reversed(key.split(".")):
            tree = {part: tree}
        refuse_untrusted(tree, where, trust)


def _parsed(text: object, where: str) -> Any:
    try:
        return OverridesParser.create().parse_override(str(text))
    except HydraException as error:
        raise ConfigError(f"{where}: '{text}' is not an override") from error


def refuse_untrusted(
    tree: Any, file: str, trust: Sequence[str] = (), line_of: Callable[[str], int | None] = lambda key: None
) -> None:
    """Raise ConfigError for anything in a config from a file that could run code or read the environment.

    file, line_of: where a key is set, for messages. trust: names of packages whose classes are allowed, and `commands`.
    """
    for key, value, owner in _walk(tree, ""):
        try:
            _refuse_value(key, value, owner, file, trust)
        except ConfigError as error:
            line = line_of(key)
            raise ConfigError(str(error).replace(f"{file}:", f"{file}, line {line}:", 1) if line else error) from error


def _refuse_value(key: str, value: Any, owner: Any, where: str, trust: Sequence[str]) -> None:
    if isinstance(value, str) and COMMANDS not in trust:
        if "pipe:" in value:
            raise ConfigError(f"{where}: {key} runs a command ({value}); trust={COMMANDS} allows it")
        if not _is_harmless(value):
            raise ConfigError(f"{where}: {key}={value}: this interpolation is not allowed without trust={COMMANDS}")
    if key.rpartition(".")[2] == "allow_pickle" and value not in (False, None) and COMMANDS not in trust:
        raise ConfigError(f"{where}: {key} opens a pickle, which can run code; trust={COMMANDS} allows it")
    if key.rpartition(".")[2] == "_target_":
        _refuse_target(value, where, key, trust)
    if isinstance(value, str) and "." in value and key.rpartition(".")[2] in ("path", "name"):
        _refuse_path(key, value, owner, where, trust)


def _walk(tree: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, value, dict or list that has it) of everything in a tree."""
    for key, value in items(tree):
        yield join(path, key), value, tree
        yield from _walk(value, join(path, key))


def _refuse_target(name: Any, where: str, key: str, trust: Sequence[str]) -> None:
    if not isinstance(name, str) or not (current_name(name) in named_in_conf()[0] or is_library_class(name)):
        refuse_package(name, where, key, trust)


def _refuse_path(key: str, value: str, owner: Any, where: str, trust: Sequence[str]) -> None:
    """Of `hydra.utils.get_object` and of samplers, whose strings are imported; other paths and names are only data."""
    target = current_name(str(owner.get("_target_"))) if isinstance(owner, dict) else None
    imports = key.endswith("sampler.name") or target in ("hydra.utils.get_object", "sdft.sampling.samplers.Sampler")
    if imports and value not in named_in_conf()[1] and not is_library_class(value):
        refuse_package(value, where, key, trust)


def refuse_package(name: Any, where: str, key: str, trust: Sequence[str]) -> None:
    """Raise ConfigError for a dotted name whose package is not in `trust`."""
    package = str(name).partition(".")[0]
    if not isinstance(name, str) or package not in trust:
        raise ConfigError(
            f"{where}: {key}={name} is not part of sdft. Only if you trust the origin of this file and the package "
            f"'{package}', add trust={package}"
        )


@functools.cache
def named_in_conf() -> tuple[frozenset[str], frozenset[str]]:
    """The targets in `conf/`, and the paths of `hydra.utils.get_object` there."""
    text = _text_of_conf()
    found = (frozenset(re.findall(rf"\b{key}:\s*([\w.]+)", text)) for key in ("_target_", "path"))
    targets, paths = found
    return targets, paths


def _is_harmless(value: str) -> bool:
    """Whether a text has only interpolations of other keys, also nested, or is one of those that compute in `conf/`."""
    rest = value
    while (simpler := HARMLESS.sub("x", rest)) != rest:
        rest = simpler
    return "${" not in rest or value in computed_in_conf()


@functools.cache
def _text_of_conf() -> str:
    return "\n".join(file.read_text(encoding="utf-8") for file in sorted(CONF_DIR.rglob("*.yaml")))


@functools.cache
def computed_in_conf() -> frozenset[str]:
    """The values in `conf/` that make a dict of other values, as `experiment=word` does.

    None of these can put together an interpolation out of values that have none.
    """
    return frozenset(re.findall(r'"(\$\{oc\.create:[^"\n]*\})"', _text_of_conf()))


def is_library_class(name: str) -> bool:
    """Whether a dotted name is an optimizer of `torch.optim` or a scheduler of diffusers."""
    package, _, attribute = name.rpartition(".")
    if package == "torch.optim":
        import torch

        found = getattr(torch.optim, attribute, None)
        return isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
    if package == "diffusers":
        from sdft.sampling.samplers import find_scheduler

        try:
            return isinstance(find_scheduler(name)[0], type)
        except UserError:
            return False
    return False
