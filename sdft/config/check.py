"""Does every `_target_` of a composed config fit the callable it names?

Knows signatures, annotations and pydantic. Must not know how the config was composed (`config_compose`), and never
calls a target: it only imports what the config names.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    InterpolationToMissingValueError,
    OmegaConfBaseException,
)
from pydantic import ConfigDict, TypeAdapter, ValidationError

from sdft.config.keys import MARKS, ConfigError, closest, did_you_mean, dotted, items, join

STRICT = ConfigDict(arbitrary_types_allowed=True, strict=True, allow_inf_nan=False)
LATER = object()
"""Stands for a value that only a running job knows, such as `${hydra:runtime.output_dir}`."""


def check(cfg: DictConfig) -> None:
    """Resolves every value and binds every `_target_` node to its callable.

    A float written as text (`"1e-4"`) is replaced in `cfg` by the number; nothing else changes.
    Raises ConfigError for a missing value, a broken interpolation, an unknown target or argument, a missing argument,
    or a value of the wrong type or out of range.
    """
    for path, node in _targets(resolve(cfg)):
        for key, number in _bind(path, node, functools.partial(_said, cfg)):
            with flag_override(cfg, ["struct", "readonly"], False):
                OmegaConf.update(cfg, key, number)


def resolve(node: Any, path: str = "") -> Any:
    """The config as plain lists and dicts, interpolations resolved; LATER where only a running job knows."""
    if isinstance(node, DictConfig) and not node._is_none():
        return {key: _value(node, key, join(path, key)) for key in node}
    if isinstance(node, ListConfig) and not node._is_none():
        return [_value(node, index, join(path, index)) for index in range(len(node))]
    return None if isinstance(node, DictConfig | ListConfig) else node


def _value(node: DictConfig | ListConfig, key: Any, path: str) -> Any:
    if OmegaConf.is_missing(node, key):
        raise ConfigError(f"{path} is not set: pass {path}=...")
    try:
        return resolve(node[key], path)
    except (OmegaConfBaseException, RecursionError) as error:
        # The missing value itself is met elsewhere in the walk.
        if isinstance(error, InterpolationToMissingValueError) or "HydraConfig was not set" in str(error):
            return LATER
        raw = OmegaConf.to_container(node, resolve=False)[key]  # type: ignore[index, call-overload]
        raise ConfigError(f"{path}: {raw} {_why(error, node)}") from None


def _why(error: Exception, node: DictConfig | ListConfig) -> str:
    if isinstance(error, InterpolationKeyError):
        wanted = str(error).split("'")[1]
        guess = did_you_mean(wanted, dotted(OmegaConf.to_container(node._get_root(), resolve=False)))
        return f"points to '{wanted}', which does not exist{guess}"
    if isinstance(error, RecursionError):
        return "refers to itself"
    if isinstance(error, GrammarParseError):
        return "is not a valid interpolation"
    reason = str(error).splitlines()[0].split("resolving interpolation: ")[-1]
    return "cannot be resolved: " + reason.strip('"')


def _targets(tree: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(tree, dict) and "_target_" in tree:
        yield path, tree
    for key, value in items(tree):
        yield from _targets(value, join(path, key))


def _said(cfg: DictConfig, key: str) -> str:
    """The key that the value of `key` was written under: with `method: {alpha: ${alpha}}` it is `alpha`."""
    outer, _, last = key.rpartition(".")
    owner = OmegaConf.select(cfg, outer) if outer else cfg
    raw = OmegaConf.to_container(owner, resolve=False) if isinstance(owner, DictConfig) else {}
    link = re.fullmatch(r"\$\{([\w.]+)\}", str(raw.get(last))) if isinstance(raw, dict) else None
    return _said(cfg, link[1]) if link else key


def _bind(path: str, node: dict[str, Any], said: Callable[[str], str]) -> Iterator[tuple[str, float]]:
    """Raises when the node does not fit its target; yields the floats written as text."""
    name = node["_target_"]
    target = locate(name, join(path, "_target_"))
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # some builtins have none
        return
    given = _given(path, name, node, parameters)
    if node.get("_partial_", False) is not True:
        for key, parameter in parameters.items():
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if key not in given and parameter.default is parameter.empty and not variadic:
                raise ConfigError(f"{path or 'the config'} needs '{key}' ({name}): set {join(path, key)}")
    hints = _hints(target)
    for key, value in given.items():
        parameter = parameters.get(key) or next(p for p in parameters.values() if p.kind == p.VAR_KEYWORD)
        if type(value) is not type(parameter.default) or value != parameter.default:
            yield from _fit(join(path, key), value, hints.get(parameter.name, Any), name, said)


def _given(path: str, name: str, node: dict[str, Any], parameters: Any) -> dict[str, Any]:
    """The arguments by name; raises on one that the target does not take."""
    positional = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    named = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    # Ours take what they name; what others do with **kwargs is theirs to check.
    rest = [p for p in parameters.values() if p.kind == p.VAR_KEYWORD]
    ours = name.startswith("sdft.") and rest and rest[0].annotation in (rest[0].empty, Any, "Any")
    for key in node:
        if key not in named and key not in MARKS and (not rest or ours):
            takes = f" It takes: {', '.join(named) or 'nothing'}"
            near = closest(key, named)
            guess = f"; did you mean '{join(path, near)}'?" if near else None
            raise ConfigError(f"unknown key '{join(path, key)}': {name} has no argument '{key}'{guess or '.'}{takes}")
    return dict(zip(positional, node.get("_args_", ()), strict=False)) | {
        key: value for key, value in node.items() if key not in MARKS
    }


def locate(name: Any, key: str) -> Any:
    """The object that a dotted name stands for, importing on the way."""
    if not isinstance(name, str) or not all(name.split(".")):
        raise ConfigError(f"{key}={name}: must be a dotted name such as sdft.objective.denoising.Denoising")
    first, *rest = name.split(".")
    found: Any = _import(first, key, name, [])
    walked = first
    for part in rest:
        outer, walked = found, f"{walked}.{part}"
        if not hasattr(outer, part) and isinstance(outer, types.ModuleType):
            _import(walked, key, name, dir(outer))
        if not hasattr(outer, part):
            raise ConfigError(f"{key}={name}: '{walked}' does not exist{did_you_mean(part, dir(outer))}")
        found = getattr(outer, part)
    if not callable(found):
        raise ConfigError(f"{key}={name}: is not callable")
    return found


def _import(module: str, key: str, name: str, siblings: list[str]) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # A parent that is no package is also "not found", under the name asked for.
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            guess = did_you_mean(module.rpartition(".")[2], siblings)
            raise ConfigError(f"{key}={name}: '{module}' does not exist{guess}") from None
        raise ConfigError(f"{key}={name}: importing {module} failed: {error}") from error


def _hints(target: Any) -> dict[str, Any]:
    """Annotations by argument; Any where one cannot be evaluated, as happens to names imported for type checkers."""
    function = target
    if isinstance(target, type):
        init = inspect.getattr_static(target, "__init__")
        function = target.__new__ if init is object.__init__ else init
    elif not hasattr(target, "__annotations__"):
        function = getattr(target, "func", type(target).__call__)
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:
        return {key: _hint(function, hint) for key, hint in getattr(function, "__annotations__", {}).items()}


def _hint(function: Any, hint: Any) -> Any:
    one = types.SimpleNamespace(__annotations__={"it": hint})
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        return typing.get_type_hints(one, scope, include_extras=True)["it"]
    except Exception:
        return Any


def _fit(key: str, value: Any, hint: Any, name: str, said: Callable[[str], str]) -> Iterator[tuple[str, float]]:
    adapter = _adapter(hint)
    if adapter is None or _opaque(value):
        return
    try:
        # Strict JSON is the wanted law: no bool as a number, no text as an int, but a list as a tuple, text as a Path.
        result = adapter.validate_json(json.dumps(value, default=str))
    except ValidationError as error:
        problems = error.errors()
        text = next((p for p in problems if p["type"] == "float_type" and isinstance(p["input"], str)), None)
        steps = _steps(value, text["loc"]) if text else []
        number = _number(_at(value, steps)) if text else None
        if number is None:
            raise ConfigError(_complaint(said(key), value, problems, name)) from None
        yield ".".join([key, *map(str, steps)]), number
        yield from _fit(key, _replaced(value, steps, number), hint, name, said)
        return
    if dataclasses.is_dataclass(result) and isinstance(value, dict):
        raise ConfigError(f"{key}: needs a _target_ that builds a {type(result).__name__} ({name})")


@functools.lru_cache(maxsize=1024)
def _cached_adapter(hint: Any) -> TypeAdapter[Any] | None:
    for config in (STRICT, None):  # dataclasses and pydantic models bring their own config
        try:
            return TypeAdapter(hint, config=config)
        except Exception:
            continue
    return None


def _adapter(hint: Any) -> TypeAdapter[Any] | None:
    try:
        return _cached_adapter(hint)
    except TypeError:  # unhashable metadata
        return _cached_adapter.__wrapped__(hint)


def _opaque(value: Any) -> bool:
    """Holds something that is not there yet: a node that will be built, or a value of the running job."""
    if isinstance(value, dict):
        return "_target_" in value or any(map(_opaque, value.values()))
    return value is LATER or (isinstance(value, list) and any(map(_opaque, value)))


def _number(text: Any) -> float | None:
    try:
        number = float(text) if isinstance(text, str) else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _steps(value: Any, loc: tuple[Any, ...]) -> list[Any]:
    """The way to what pydantic points at; its steps that name a member of a union are skipped."""
    steps = []
    for step in loc:
        children = dict(items(value))
        if step in children:
            steps.append(step)
            value = children[step]
    return steps


def _at(value: Any, steps: list[Any]) -> Any:
    return functools.reduce(lambda inner, step: inner[step], steps, value)


def _replaced(value: Any, steps: list[Any], new: Any) -> Any:
    if not steps:
        return new
    changed = value.copy()
    changed[steps[0]] = _replaced(value[steps[0]], steps[1:], new)
    return changed


def _complaint(key: str, value: Any, problems: list[Any], name: str) -> str:
    steps = _steps(value, problems[0]["loc"])
    where, wrong = ".".join([key, *map(str, steps)]), _at(value, steps)
    says: dict[str, None] = {}
    for problem in problems:
        text = re.sub(r"^\w+ should", "must", problem["msg"]).replace("a valid array", "a list")
        if problem["type"] == "needs_python_object":
            text = "must be an object built by a _target_"
        elif problem["type"] == "missing":
            text = f"must have more in it ({'.'.join(map(str, problem['loc']))} is missing)"
        says[text if not says else text.removeprefix("must be ")] = None
    allowed = " ".join(p["ctx"]["expected"] for p in problems if p["type"] == "literal_error").split("'")[1::2]
    shown = "null" if wrong is None else str(wrong).lower() if isinstance(wrong, bool) else wrong
    guess = did_you_mean(str(wrong), allowed)
    quoted = f"'{wrong}'" if isinstance(wrong, str) and not wrong.strip() else shown
    return f"{where}={quoted}: {' or '.join(says)} ({name}){guess}"
