"""What must not be published: tokens, paths of this machine, and values of the environment that are secret."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdft.errors import UserError

NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
"""Of environment variables whose values are secret."""
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
LEAST = 6
"""Characters of a path or secret that is looked for: shorter ones are in any text."""
TEXTS = (".json", ".md", ".txt", ".yaml", ".yml", "")


def refuse_secrets(folder: Path, config: Mapping[str, Any] | None = None) -> None:
    """Raise UserError if a file of a folder holds a secret or a path of this machine.

    Looked at are texts, and the headers of safetensors files. config: of the run, whose paths must not be there.
    """
    wanted = dict(secrets(config or {}))
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        text = readable(file)
        found = next((what for value, what in wanted.items() if value in text), None)
        found = found or ("a token of the Hub" if TOKEN.search(text) else None)
        if found:
            name = file.relative_to(folder)
            raise UserError(f"out={folder}: {name} holds {found}, so that nothing was uploaded; remove it there first")


def secrets(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(text, what it is)."""
    home = str(Path.home())
    if len(home) > 1:
        yield f"{home}/", "the path of your home directory"
    for name, value in os.environ.items():
        if NAMES.search(name) and len(value) >= LEAST:
            yield value, f"the value of the environment variable {name}"
    for key, text in paths(config):
        yield text, f"the path of {key}"


def paths(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """(key, path) of absolute paths in a config."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from paths(value, f"{key}.{name}" if key else str(name))
            yield from paths(name, f"a key of {key}")
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from paths(value, f"{key}[{number}]")
    elif (
        isinstance(tree, str)
        and len(tree) >= LEAST
        and (tree.startswith(("/", "~/")) or re.match(r"[A-Za-z]:[\\/]", tree))
    ):
        yield key, tree


def readable(file: Path) -> str:
    """The text of a file: all of a text file, the header of a safetensors file, nothing of others."""
    if file.suffix == ".safetensors":
        with file.open("rb") as opened:
            return opened.read(int.from_bytes(opened.read(8), "little")).decode(errors="replace")
    return file.read_text(encoding="utf-8", errors="replace") if file.suffix in TEXTS else ""
