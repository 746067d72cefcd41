"""Dotted keys of plain trees of dicts and lists, and the suggestion for one that does not exist."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from sdft.errors import UserError, closest

MARKS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
"""Keys that `hydra.utils.instantiate` reads; all others are arguments of the target."""


class ConfigError(UserError):
    """The config is wrong; the message names the key or group and what to write instead."""


def nearest(key: str, tree: dict[str, Any], groups: list[str]) -> str:
    """What follows "unknown key": a sibling spelled like it, a key of that name elsewhere, a similar key, or all siblings."""
    parent, _, last = key.rpartition(".")
    siblings = {str(name): join(parent, name) for name, _ in items(at(tree, parent)) if name not in MARKS}
    known = [k for k in sorted([*groups, *dotted(tree)], key=len) if k != key]
    by_name = {leaf(k): k for k in reversed(known)}  # the shortest key of each name
    guess = siblings.get(closest(last, siblings) or "") or by_name.get(leaf(key))
    if guess is None and not (parent and siblings):
        guess = closest(key, known) or by_name.get(closest(last, by_name) or "")
    if guess:
        return f"; did you mean '{guess}'?"
    where = f"in '{parent}'" if parent else "at the top"
    return f". Known {where}: {', '.join(siblings)}" if siblings else ""


def join(path: str, key: object) -> str:
    """`path.key`; the key alone at the top."""
    return f"{path}.{key}" if path else str(key)


def leaf(key: str) -> str:
    """The last part of a key or of a group."""
    return re.split("[./]", key)[-1]


def items(tree: Any) -> Iterable[tuple[Any, Any]]:
    """The children of a dict or list with their keys; nothing for other values."""
    return tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()


def dotted(tree: Any, path: str = "") -> Iterator[str]:
    """Every key of a tree, inner nodes included, MARKS left out."""
    for key, value in items(tree):
        if key not in MARKS:
            yield join(path, key)
            yield from dotted(value, join(path, key))


def at(tree: Any, key: str) -> Any:
    """The value of a key such as `a.b[0]`; None if it does not exist, the tree itself for an empty key."""
    for part in filter(None, re.split(r"[.\[\]]+", key)):
        tree = {str(k): v for k, v in items(tree)}.get(part)
    return tree


def undeclared(content: dict[Any, Any], tree: Any, path: str = "") -> Iterator[str]:
    """Keys of `content` that `tree` does not have.

    Left out: arguments of a `_target_` node (its signature decides), a whole new `_target_` node below the top (one
    more callback), anything in a dict that is declared empty, and Hydra's own settings.
    """
    if not isinstance(tree, dict) or (path and not tree) or "_target_" in tree or (path and "_target_" in content):
        return
    for key, value in content.items():
        if key in tree:
            yield from undeclared(value, tree[key], join(path, key)) if isinstance(value, dict) else ()
        elif (path or key != "hydra") and not (path and isinstance(value, dict) and "_target_" in value):
            yield join(path, key)
