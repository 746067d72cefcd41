"""Trees of dicts and lists as flat dicts of dotted keys, and the suggestion for a key that does not exist."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from sdft.errors import UserError, closest

MARKS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
"""Keys that `hydra.utils.instantiate` reads; all others are arguments of the target."""


class ConfigError(UserError):
    """The config is wrong; the message names the key or group and what to write instead."""


def join(path: str, key: object) -> str:
    """`path.key`; the key alone at the top."""
    return f"{path}.{key}" if path else str(key)


def leaf(key: str) -> str:
    """The last part of a key or of a group."""
    return re.split("[./]", key)[-1]


def items(tree: Any) -> Iterable[tuple[Any, Any]]:
    """The children of a dict or list with their keys; nothing for other values."""
    return tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """Every key of a tree with its value, inner nodes included."""
    flat: dict[str, Any] = {}
    for key, value in items(tree):
        flat[join(path, key)] = value
        flat |= flatten(value, join(path, key))
    return flat


def undeclared(content: dict[str, Any], tree: dict[str, Any]) -> Iterator[str]:
    """Keys of one flat tree that another does not have; of a new dict only its own key.

    Left out: arguments of a `_target_` node (its signature decides), a whole new `_target_` node below the top (one
    more callback), and anything in a dict that is declared empty.
    """
    nodes = {key.removesuffix("._target_") for key in [*content, *tree] if key.endswith("._target_")}
    for key in content:
        parents = {key[: dot.start()] for dot in re.finditer(r"\.", key)}
        is_new = key not in tree and parents <= tree.keys() and not (parents and key in nodes)
        if is_new and not parents & nodes and not any(tree[parent] == {} for parent in parents):
            yield key


def nearest(key: str, tree: Iterable[str], groups: Iterable[str]) -> str:
    """What follows "unknown key": a sibling like it, a key of its name elsewhere, a similar key, or all siblings."""
    known = [k for k in sorted([*groups, *tree], key=len) if k != key and leaf(k) not in MARKS]
    parent, _, last = key.rpartition(".")
    siblings = {leaf(k): k for k in tree if k in known and k.rpartition(".")[0] == parent}
    by_name = {leaf(k): k for k in reversed(known)}  # the shortest key of each name
    guess = siblings.get(closest(last, siblings) or "") or by_name.get(leaf(key))
    if guess is None and not (parent and siblings):
        guess = closest(key, known) or by_name.get(closest(last, by_name) or "")
    if guess:
        return f"; did you mean '{guess}'?"
    where = f"in '{parent}'" if parent else "at the top"
    return f". Known {where}: {', '.join(siblings)}" if siblings else ""
