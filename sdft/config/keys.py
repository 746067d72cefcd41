"""Dotted keys in plain trees of dicts and lists, and the words of an error about them.

Knows neither Hydra nor signatures; the other `config_*` files stand on it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from sdft.errors import UserError

MARKS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
"""Keys that speak to Hydra's instantiate, not to the target."""


class ConfigError(UserError):
    """The config is wrong; the message names the key or group and what to write instead."""


def closest(word: object, candidates: Iterable[object]) -> str | None:
    """The candidate that looks most like the word, if one does."""
    return next(iter(difflib.get_close_matches(str(word), [str(c) for c in candidates], 1)), None)


def did_you_mean(word: object, candidates: Iterable[object]) -> str:
    """`; did you mean 'x'?`, or nothing when no candidate is close."""
    guess = closest(word, candidates)
    return f"; did you mean '{guess}'?" if guess else ""


def join(path: str, key: object) -> str:
    """`path.key`; the key alone at the top."""
    return f"{path}.{key}" if path else str(key)


def split(key: str) -> list[str]:
    """`a.b[0]` -> a, b, 0."""
    return [part for part in re.split(r"[.\[\]]+", key) if part]


def leaf(key: str) -> str:
    """The last word of a key or of a group."""
    return re.split("[./]", key)[-1]


def nest(path: Iterable[str], value: Any) -> Any:
    """The tree in which only `path` exists."""
    for part in reversed(list(path)):
        value = {part: value}
    return value


def items(tree: Any) -> Iterable[tuple[Any, Any]]:
    """Children of a tree with their keys; a leaf has none."""
    return tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()


def dotted(tree: Any, path: str = "") -> Iterator[str]:
    """Every key of a tree, inner nodes included, MARKS left out."""
    for key, value in items(tree):
        if key not in MARKS:
            yield join(path, key)
            yield from dotted(value, join(path, key))


def has(tree: Any, key: str) -> bool:
    """Whether the key exists; what lies behind an interpolation cannot be known here, so it does."""
    for part in split(key):
        found = {str(k): v for k, v in items(tree)}
        if part not in found:
            return isinstance(tree, str) and "${" in tree
        tree = found[part]
    return True


def at(tree: Any, key: str) -> Any:
    """The value of a key, None where it does not exist; the tree itself for no key."""
    for part in split(key):
        tree = {str(k): v for k, v in items(tree)}.get(part)
    return tree


def nearest(key: str, tree: dict[str, Any], groups: list[str]) -> str:
    """What to say after an unknown key: a sibling, else its namesake, else a look-alike, else all the siblings."""
    parent, _, last = key.rpartition(".")
    siblings = [str(name) for name, _ in items(at(tree, parent)) if name not in MARKS]
    known = [k for k in [*groups, *dotted(tree)] if k != key]
    namesakes: dict[str, list[str]] = {}
    for candidate in known:
        namesakes.setdefault(leaf(candidate), []).append(candidate)
    guess = join(parent, near) if (near := closest(last, siblings)) else None
    if guess is None and leaf(key) in namesakes:
        guess = min(namesakes[leaf(key)], key=len)
    if guess is None and not (parent and siblings):
        name = closest(last, namesakes)
        guess = closest(key, known) or (min(namesakes[name], key=len) if name else None)
    if guess:
        return f"; did you mean '{guess}'?"
    where = f"in '{parent}'" if parent else "at the top"
    return f". Known {where}: {', '.join(siblings)}" if siblings else ""


def merge(tree: dict[str, Any], said: dict[str, Any]) -> None:
    """Adds to the tree what else was said."""
    for key, value in said.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = value


def strays(said: dict[Any, Any], tree: Any, path: str = "") -> Iterator[str]:
    """Keys said that the tree does not declare.

    Not strays: arguments of a `_target_` node (its signature judges them), a whole new `_target_` node below the top
    (one more callback), anything in a dict that is declared empty, Hydra's own settings.
    """
    if not isinstance(tree, dict) or (path and not tree) or "_target_" in tree or (path and "_target_" in said):
        return
    for key, value in said.items():
        if key == "hydra" and not path:
            continue
        if key not in tree:
            if not (path and isinstance(value, dict) and "_target_" in value):
                yield join(path, key)
        elif isinstance(value, dict):
            yield from strays(value, tree[key], join(path, key))
