"""The state of a run in one file: it appears whole or not at all, and what is damaged is named.

Knows bytes and checksums; must not know what a trainer keeps in it, nor how many processes it ran on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdft.types import UserError


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write `state` so that a kill, a full disk or a power cut at any moment leaves the file that was there before.

    Raises UserError with the path and the space needed.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _fsync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        cause = _os_error(error)
        if cause is None:
            raise
        raise UserError(_complaint(path, cause, num_bytes(state))) from error


def read_state(path: Path) -> dict[str, Any]:
    """The state in a file, its tensors mapped, not read. Raises UserError where the file is cut off or altered."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself does not compare the checksums that it writes
        if damaged is None:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(_damaged(path, str(error))) from error
    raise UserError(_damaged(path, f"its entry {damaged} was altered"))


def num_bytes(state: Any) -> int:
    """Bytes of all tensors of a nested state."""
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(num_bytes(value) for value in state.values())
    return sum(num_bytes(value) for value in state) if isinstance(state, list | tuple) else 0


def _fsync_folder(folder: Path) -> None:
    """The new name is on disk too."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _os_error(error: BaseException | None) -> OSError | None:
    """The error of the file under one of torch's writer."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _complaint(path: Path, error: OSError, needed: int) -> str:
    kept = f"; the {path.name} of before is intact" if path.is_file() else ""
    text = f"{path}: the checkpoint cannot be written ({error.strerror or error}){kept}. "
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with contextlib.suppress(OSError):
            text += f"It needs {_megabytes(needed)}, and {_megabytes(shutil.disk_usage(path.parent).free)} are free. "
    return text + "Make room, or set another run_dir, and go on with resume="


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _damaged(path: Path, why: str) -> str:
    others = sorted(other.name for other in path.parent.glob("*.ckpt") if other != path)
    instead = f"resume={path.parent / others[-1]}" if others else "no resume"
    return f"resume: {path} is damaged ({why}); start again with {instead}"
