"""The folder and the name of a run, checked before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

from sdft.config.keys import ConfigError

MAX_NAME, MAX_PATH = 200, 3500
"""Bytes. File systems allow 255 and 4096, and the files in the folder need some of them."""


def refuse_name(name: object) -> None:
    """Raise ConfigError for a name of a run that is no name of a file."""
    text = str(name)
    if not text or text in (".", "..") or any(char in "/\\" or not char.isprintable() for char in text):
        raise ConfigError(f"name={text!r}: is part of file names: use letters, digits, dots, dashes and underscores")
    if len(os.fsencode(text)) > MAX_NAME:
        raise ConfigError(f"name={text[:30]}...: is longer than {MAX_NAME} bytes, too long for file names")


def refuse_path(key: str, path: object) -> None:
    """Raise ConfigError if nothing can be written to this path: it is empty, too long or no path.

    key: of the option that names it.
    """
    text = "" if path is None else str(path)
    if not text.strip():
        raise ConfigError(f"{key} is empty: name a place to write to")
    try:
        parts = [len(os.fsencode(part)) for part in Path(text).expanduser().absolute().parts]
    except (ValueError, RuntimeError, UnicodeEncodeError) as error:
        raise ConfigError(f"{key}={text[:60]!r}: is not a path ({error})") from error
    if "\0" in text:
        raise ConfigError(f"{key}={text!r}: has a character that no path can have")
    if sum(parts) + len(parts) > MAX_PATH or max(parts) > 255:
        raise ConfigError(f"{key}={text[:60]}...: is too long for a path; choose a shorter one")


def refuse_folder(key: str, folder: object) -> None:
    """Raise ConfigError if a run cannot have this folder: no path, a file, or not writable."""
    refuse_path(key, folder)
    where, path = f"{key}={folder}", Path(str(folder)).expanduser().absolute()
    nearest = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if not nearest.is_dir():
        what = "is a file" if nearest == path else f"{nearest} is a file"
        raise ConfigError(f"{where}: {what}, not a folder; choose another one")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{where}: {nearest} cannot be written to; choose another place, or change its permissions")
    refuse_links(where, path)


def refuse_links(where: str, folder: Path) -> None:
    """Raise ConfigError if a file of an existing run folder is a link to one outside, which the run would change.

    Links to folders are fine: checkpoints may lie on another disk.
    """
    inside = folder.resolve()
    for parent in (folder, folder / ".hydra"):
        for entry in os.scandir(parent) if parent.is_dir() else ():
            target = Path(entry.path).resolve()
            if entry.is_symlink() and not target.is_dir() and inside not in target.parents:
                raise ConfigError(f"{where}: {entry.path} is a link to {target}; put a copy in its place, or remove it")
