"""Output files and folders: written beside their place, and put there whole or not at all.

Replaces only what a model's layout has. Must not depend on what is written.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdft.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota or a file-size limit that leaves no room."""
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
TOP = re.compile(r"model_index\.json|config\.json|(diffusion_pytorch_)?model.*\.(safetensors|bin)(\.index\.json)?")
INSIDE = re.compile(
    r"(config|generation_config|scheduler_config|preprocessor_config|tokenizer|tokenizer_config|special_tokens_map"
    r"|added_tokens|vocab)\.json|merges\.txt|(diffusion_pytorch_|pytorch_)?model.*\.(safetensors|bin)(\.index\.json)?"
)
"""Names of the files of a model's folder, and of its parts."""
DESKTOP = (".DS_Store", "Thumbs.db", "desktop.ini")
"""What file managers leave in folders."""
MAX_NAMED = 5
REPLACED = "replaced"
WRITING = ".writing-"
"""The start of the name of a folder in which something is written, beside its place."""


@contextmanager
def atomic_output(
    target: Path,
    key: str = "",
    overwrite: bool = False,
    num_bytes: int | None = None,
    others: re.Pattern[str] | None = None,
) -> Iterator[Path]:
    """A temporary path to write to inside the `with`; renamed to `target` at the end, or removed after an error.

    key: of the option that named the target, for error messages. overwrite: replace `target` if it exists.
    num_bytes: what will be written, for the message of a full disk. others: see `refuse_to_replace`.

    Raises UserError for a target that must not be replaced, and where the disk is full or cannot be written to.
    """
    where = f"{key}={target}" if key else str(target)
    refuse_to_replace(target, key, overwrite, others)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent)
        prefix = f"{WRITING}{socket.gethostname()}-{os.getpid()}-"
        temporary = tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix)
    except OSError as error:
        raise UserError(f"{where}: cannot be written ({error.strerror}); choose another path") from error
    with temporary as folder:
        written = Path(folder) / target.name
        with full_disk_reported(target, key, num_bytes):
            yield written
            if target.exists():
                target.rename(Path(folder) / REPLACED)
            written.rename(target)


@contextmanager
def full_disk_reported(target: Path, key: str = "", num_bytes: int | None = None) -> Iterator[None]:
    """Turns a full disk, while something is written beside `target`, into a UserError; see `atomic_output`."""
    try:
        yield
    except Exception as error:
        if (problem := no_room(error)) is None:
            raise
        where = f"{key}={target}" if key else str(target)
        needed = f"needs {format_size(num_bytes)}, " if num_bytes is not None else ""
        free = f"{format_size(shutil.disk_usage(target.parent).free)} are free there"
        kept = "; what was there before is intact" if target.exists() else ""
        message = f"{where}: {needed}{free} ({problem}); make room or choose another path{kept}"
        raise UserError(message) from error


def remove_leftovers(folder: Path) -> None:
    """Remove what processes of this machine that were killed have half written in a folder, an hour ago or more.

    What was to be replaced stays: between two renames, the only whole copy may be there. The hour is for containers
    with the same host name, whose processes have numbers of their own.
    """
    for path in folder.glob(f"{WRITING}{socket.gethostname()}-*"):
        pid = path.name.removeprefix(f"{WRITING}{socket.gethostname()}-").partition("-")[0]
        is_dead = pid.isdigit() and Path("/proc/self").exists() and not Path(f"/proc/{pid}").exists()
        if not is_dead or (path / REPLACED).exists():
            continue
        with contextlib.suppress(OSError):
            if max(file.stat().st_mtime for file in (path, *path.rglob("*"))) < time.time() - 3600:
                shutil.rmtree(path)


def no_room(error: BaseException) -> str | None:
    """The system's words if an error means that there is no room left on a disk, else None."""
    if isinstance(error, OSError) and error.errno in FULL:
        return error.strerror
    # What safetensors raises has the number in its text.
    found = re.search(r"(\w[\w ]*) \(os error (\d+)\)", str(error))
    return found[1] if found and int(found[2]) in FULL else None


def refuse_to_replace(
    target: Path, key: str = "", overwrite: bool = False, others: re.Pattern[str] | None = None
) -> None:
    """Raise UserError if something is at `target` that must stay there.

    With `overwrite`, a file is replaced, and a folder that holds nothing but a model.
    others: pattern of further files and folders, by name, that may be in such a folder.
    """
    where = f"{key}={target}" if key else str(target)
    if not target.exists():
        return
    if not overwrite:
        raise UserError(f"{where}: exists already; pass overwrite=true to replace it, or choose another name")
    foreign = foreign_files(target) if target.is_dir() else []
    if foreign := [name for name in foreign if others is None or not others.fullmatch(name)]:
        named = ", ".join(foreign[:MAX_NAMED]) + (f" and {len(foreign) - MAX_NAMED} more" * (len(foreign) > MAX_NAMED))
        raise UserError(
            f"{where}: holds files that are not part of a model and would be deleted: {named}; move them away, or "
            "choose another path"
        )


def foreign_files(folder: Path) -> list[str]:
    """Files and folders in a model's folder that do not belong to the model, relative to it."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name in PARTS and path.is_dir() and not path.is_symlink():
            found += [f"{path.name}/{file.name}" for file in sorted(path.iterdir()) if not _belongs(file, INSIDE)]
        elif not _belongs(path, TOP):
            found.append(path.name + "/" * path.is_dir())
    return found


def _belongs(path: Path, names: re.Pattern[str]) -> bool:
    return path.name in DESKTOP or (not path.is_dir() and names.fullmatch(path.name) is not None)


def format_size(num_bytes: int) -> str:
    """A size in GiB or MiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**29 else f"{num_bytes / 2**20:.1f} MiB"
