"""Whether every `_target_` of a composed config fits the signature of the callable that it names.

Imports what the config names and calls nothing. Does not know how the config was composed (`compose`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override
from omegaconf.errors import InterpolationKeyError, InterpolationToMissingValueError, OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from sdft.config.keys import MARKS, ConfigError, flatten, items, join, leaf
from sdft.errors import closest, did_you_mean

STRICT = ConfigDict(arbitrary_types_allowed=True, strict=True, allow_inf_nan=False)
NUMBER = re.compile(r"[+-]?\d*\.?\d+(e[+-]?\d+)?", re.IGNORECASE)
LATER = object()
"""Stands for a value that only a running job knows, such as `${hydra:runtime.output_dir}`."""


def check(cfg: DictConfig) -> None:
    """Resolve every value, and compare the arguments of every `_target_` node with its signature.

    A float written as text (`"1e-4"`) is replaced in `cfg` by the number; nothing else changes.
    Raises ConfigError for a missing value, a broken interpolation, an unknown target or argument, a missing argument,
    or a value of the wrong type or out of range.
    """
    for path, node in _target_nodes(resolve(cfg)):
        target = locate(node["_target_"], join(path, "_target_"))
        try:
            parameters = inspect.signature(target).parameters
        except ValueError:  # some builtins have none
            continue
        for key, value in _arguments(path, node, list(parameters.values())).items():
            parameter = parameters.get(key) or next(p for p in parameters.values() if p.kind == p.VAR_KEYWORD)
            is_default = type(value) is type(parameter.default) and value == parameter.default
            if not is_default and not _opaque(value) and (adapter := _adapter(target, parameter.name)):
                _check_value(cfg, join(path, key), value, adapter, node["_target_"])


def resolve(node: Any, path: str = "") -> Any:
    """The config as plain dicts and lists, interpolations resolved; LATER for what only a running job knows."""
    if not isinstance(node, DictConfig | ListConfig):
        return node
    if node._is_none():
        return None
    keys = list(node) if isinstance(node, DictConfig) else range(len(node))
    values = {key: _value(node, key, join(path, key)) for key in keys}
    return values if isinstance(node, DictConfig) else list(values.values())


def _value(node: Any, key: Any, path: str) -> Any:
    if OmegaConf.is_missing(node, key):
        raise ConfigError(f"{path} is not set: pass {path}=...")
    try:
        return resolve(node[key], path)
    except (OmegaConfBaseException, RecursionError) as error:
        reason = str(error).splitlines()[0].split("resolving interpolation: ")[-1].strip('"')
        # The missing value itself is reported where it is declared.
        if isinstance(error, InterpolationToMissingValueError) or "HydraConfig was not set" in reason:
            return LATER
        raw, why = OmegaConf.to_container(node, resolve=False)[key], f"cannot be resolved: {reason}"  # type: ignore
        if isinstance(error, InterpolationKeyError):
            wanted, known = reason.split("'")[1], flatten(OmegaConf.to_container(node._get_root(), resolve=False))
            why = f"points to '{wanted}', which does not exist{did_you_mean(wanted, known)}"
        raise ConfigError(f"{path}: {raw} {why}") from None


def _target_nodes(tree: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(tree, dict) and "_target_" in tree:
        yield path, tree
    for key, value in items(tree):
        yield from _target_nodes(value, join(path, key))


def locate(name: Any, key: str) -> Any:
    """The callable that a dotted name stands for, imported if necessary. key: whose value it is, for messages."""
    if not isinstance(name, str) or not all(name.split(".")):
        raise ConfigError(f"{key}={name}: must be a dotted name such as sdft.objective.denoising.Denoising")
    found, walked = None, ""
    for part in name.split("."):
        outer, walked = found, join(walked, part)
        try:
            found = getattr(outer, part) if hasattr(outer, part) else importlib.import_module(walked)
        except ImportError as error:
            if not isinstance(error, ModuleNotFoundError) or not f"{walked}.".startswith(f"{error.name}."):
                raise ConfigError(f"{key}={name}: importing {walked} failed: {error}") from error
            # A plugin of Hydra is called as its package on PyPI.
            is_plugin, package = name.startswith("hydra_plugins."), name.replace("_", "-").split(".")[1:2]
            remedy = f"; pip install {package[0]}" if is_plugin else did_you_mean(part, dir(outer))
            raise ConfigError(f"{key}={name}: '{walked}' does not exist{remedy}") from None
    if not callable(found):
        raise ConfigError(f"{key}={name}: is not callable")
    return found


def _arguments(path: str, node: dict[str, Any], parameters: list[inspect.Parameter]) -> dict[str, Any]:
    """The arguments of a node by name. Raises ConfigError if one is missing, or if the target does not take it."""
    name, given = node["_target_"], {key: value for key, value in node.items() if key not in MARKS}
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    # A target of this project ignores an untyped **kwargs; what others do with theirs is for them to check.
    rest = [p for p in parameters if p.kind == p.VAR_KEYWORD]
    if not rest or (name.startswith("sdft.") and rest[0].annotation in (inspect.Parameter.empty, Any, "Any")):
        for key in (key for key in given if key not in named):
            guess = f"; did you mean '{join(path, near)}'?" if (near := closest(key, named)) else "."
            takes = f"It takes: {', '.join(named) or 'nothing'}"
            raise ConfigError(f"unknown key '{join(path, key)}': {name} has no argument '{key}'{guess} {takes}")
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    given = dict(zip(positional, node.get("_args_", ()), strict=False)) | given
    for p in parameters if node.get("_partial_") is not True else ():
        if p.name not in given and p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise ConfigError(f"{path or 'the config'} needs '{p.name}' ({name}): set {join(path, p.name)}")
    return given


def _opaque(value: Any) -> bool:
    """Whether it holds a node that will be built, or a value of the running job."""
    is_node = isinstance(value, dict) and "_target_" in value
    return value is LATER or is_node or any(_opaque(child) for _, child in items(value))


@functools.cache
def _adapter(target: Any, argument: str) -> TypeAdapter[Any] | None:
    """Validates a list of one value of the argument; None if its annotation is missing or cannot be evaluated."""
    annotation = inspect.signature(target).parameters[argument].annotation
    function = inspect.unwrap(inspect.getattr_static(target, "__init__") if isinstance(target, type) else target)
    try:
        scope = getattr(function, "__globals__", vars(sys.modules[target.__module__]))
        one = types.SimpleNamespace(__annotations__={} if annotation is inspect.Parameter.empty else {"it": annotation})
        hint = typing.get_type_hints(one, scope, include_extras=True)["it"]
        one_value: Any = types.GenericAlias(tuple, (hint,))  # as dataclasses take no config from outside
        return TypeAdapter(one_value, config=STRICT)
    except Exception:  # of any kind: a name imported for type checkers only, a type that pydantic does not know
        return None


def _check_value(cfg: DictConfig, key: str, value: Any, adapter: TypeAdapter[Any], name: str) -> None:
    try:
        # Strict JSON: no bool as a number, no text as an int, but a list as a tuple and text as a Path.
        (result,) = adapter.validate_json(json.dumps([value], default=str))
    except ValidationError as error:
        for problem in error.errors():
            place, wrong = _wrong_part(key, value, problem["loc"])
            if problem["type"] == "float_type" and NUMBER.fullmatch(str(wrong)):
                with flag_override(cfg, ["struct", "readonly"], False):
                    OmegaConf.update(cfg, place, float(wrong))
                return check(cfg)
        key, wrong = _wrong_part(_written_at(cfg, key), value, error.errors()[0]["loc"])
        raise ConfigError(_complaint(_written_at(cfg, key), wrong, error.errors(), name)) from None
    if dataclasses.is_dataclass(result) and isinstance(value, dict):
        raise ConfigError(f"{key}: needs a _target_ that builds a {type(result).__name__} ({name})")


def _wrong_part(key: str, value: Any, location: tuple[int | str, ...]) -> tuple[str, Any]:
    """Key and value of what pydantic points at in a list of one; steps that name members of a union are skipped."""
    for step in location[1:]:
        children = dict(items(value))
        if step in children:
            key, value = join(key, step), children[step]
    return key, value


def _written_at(cfg: DictConfig, key: str) -> str:
    """The key that a value was written under: with `method: {alpha: ${alpha}}`, `alpha` for `method.alpha`."""
    outer, _, last = key.rpartition(".")
    owner = OmegaConf.select(cfg, outer) if outer else cfg
    raw = OmegaConf.to_container(owner, resolve=False) if isinstance(owner, DictConfig | ListConfig) else {}
    link = re.fullmatch(r"\$\{([\w.]+)\}", str({str(name): value for name, value in items(raw)}.get(last)))
    return _written_at(cfg, link[1]) if link else key


def users_key(cfg: DictConfig, message: str) -> str:
    """A message of a constructor with the key that the user wrote: `lora=` for `delta=`, with `{delta: ${lora}}`."""
    found = re.match(r"([a-z_][\w.]*)(?=[=: ])", message)
    raw = flatten(OmegaConf.to_container(cfg, resolve=False))
    if found is None or (found[1] in raw and not str(raw[found[1]]).startswith("${")):
        return message
    for key, value in raw.items():
        link = re.fullmatch(r"\$\{([\w.]+)\}", str(value))
        if link and leaf(key) == leaf(found[1]) and link[1] in raw:
            return f"{_written_at(cfg, link[1])}{message[found.end() :]}"
    return message


def _complaint(key: str, wrong: Any, problems: list[Any], name: str) -> str:
    reasons: dict[str, None] = {}
    for problem in problems:
        text = re.sub(r"^\w+ should", "must", problem["msg"]).replace("a valid array", "a list")
        if problem["type"] == "needs_python_object":
            text = "must be an object built by a _target_"
        elif problem["type"] == "missing":
            text = f"must have more in it ({'.'.join(map(str, problem['loc'][1:]))} is missing)"
        reasons[text.removeprefix("must be ") if reasons else text] = None
    allowed = " ".join(p["ctx"]["expected"] for p in problems if p["type"] == "literal_error").split("'")[1::2]
    shown = json.dumps(wrong) if wrong is None or isinstance(wrong, bool) or wrong == "" else wrong
    return f"{key}={shown}: {' or '.join(reasons)} ({name}){did_you_mean(wrong, allowed)}"
