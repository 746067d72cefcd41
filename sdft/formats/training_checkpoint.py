"""Training checkpoints on disk: written atomically, and verified by their checksums when they are read.

A checkpoint is one file, or one file beside a folder with slices of its largest tensors, written by several processes.
Then the file has everything else and the names of the slice files; it is written last, and until then the previous
checkpoint is valid. Must not depend on what the trainer saves, nor on which process writes which slices.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdft.errors import UserError

VERSION = "pytorch-lightning_version"
SLICE_FILES = "slice_files"
"""The key of a state for the names of its slice files."""


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """Write `state` atomically: after a kill, a full disk or a power cut, the previous checkpoint is intact.

    Raises UserError with the path and the space needed.
    """
    _write(state, path, path)
    _remove_slices(path, keep=state.get(SLICE_FILES, ()))


def write_slices(slices: Sequence[Tensor], path: Path, name: str) -> None:
    """Write slices for the checkpoint `path`, before `write_state` writes that file; atomic too."""
    _write({"slices": slices}, slices_folder(path) / name, path)


def read_state(path: Path) -> dict[str, Any]:
    """The state in a file. Its tensors are memory-mapped; sliced ones are concatenated on access.

    Raises UserError if a file is missing, truncated or altered.
    """
    try:
        return _read(path)
    except _Unreadable as error:
        raise UserError(_read_error_message(path, str(error))) from error


def refuse_foreign(state: Any, path: Path) -> None:
    """Raise UserError if a state, read from `path`, is not that of a run of this project."""
    if lacking := _lacking(state):
        raise UserError(_read_error_message(path, f"{path} is not a checkpoint of a run (it lacks {lacking})"))


def link_state(path: Path, other: Path) -> None:
    """Hard-link a checkpoint to a second name, which takes no space. Raises OSError."""
    remove_state(other)
    for file in slices_folder(path).glob("[!.]*"):
        slices_folder(other).mkdir(exist_ok=True)
        os.link(file, slices_folder(other) / file.name)
    os.link(path, other)


def remove_state(path: Path) -> None:
    """Remove a checkpoint, if it exists."""
    path.unlink(missing_ok=True)
    _remove_slices(path)


def slices_folder(path: Path) -> Path:
    """The folder of a checkpoint's slices."""
    return path.with_name(f"{path.name}.slices")


class SlicedTensor(NamedTuple):
    """A tensor cut along its first axis."""

    parts: Sequence[Tensor]


class LazyDict(dict[Any, Any]):
    """A dict that concatenates a sliced tensor on each access, so that only one at a time takes memory.

    It subclasses dict because torch's optimizers require one.
    """

    def __getitem__(self, key: Any) -> Any:
        return _concatenated(super().__getitem__(key))

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__()  # overridden: with dict's own __iter__, dict(x) copies without __getitem__

    get: Any = Mapping.get
    items: Any = Mapping.items
    values: Any = Mapping.values
    pop: Any = MutableMapping.pop

    def __deepcopy__(self, memo: Any) -> LazyDict:
        return self  # Lightning deep-copies what it passes to callbacks, which would read everything


def num_bytes(state: Any) -> int:
    """Bytes of all tensors in a nested state, without sliced ones."""
    if isinstance(state, Tensor):
        return 0 if state.is_meta else state.nbytes
    if isinstance(state, Mapping):
        return sum(num_bytes(value) for value in state.values())
    return sum(num_bytes(value) for value in state) if isinstance(state, list | tuple) else 0


def _write(state: Mapping[str, Any], file: Path, path: Path) -> None:
    """Write one of the files of the checkpoint `path`."""
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as opened:
            torch.save(state, opened)
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
        _fsync_folder(file.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        cause = _os_error(error)
        if cause is None:
            raise
        raise UserError(_write_error_message(file, path, cause, num_bytes(state))) from error


class _Unreadable(Exception):
    """A checkpoint that cannot be read; the message says which file, and why."""


def _read(path: Path) -> dict[str, Any]:
    state = _load_verified(path)
    names = state.pop(SLICE_FILES, None) if isinstance(state, dict) else None
    if names is None:
        return state
    try:
        slices = [_load_verified(slices_folder(path) / Path(name).name)["slices"] for name in names]
        return _attach_slices(state, zip(*slices, strict=True))
    except (TypeError, KeyError, ValueError, StopIteration) as error:
        raise _Unreadable(f"{path} and its slices do not fit together") from error


def _load_verified(file: Path) -> dict[str, Any]:
    """The content of one of the files of a checkpoint."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # torch does not verify the checksums that it writes
        if damaged is None:
            return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError as error:
        raise _Unreadable(f"{file} is missing") from error
    except pickle.UnpicklingError as error:
        raise _Unreadable(f"{file} holds more than tensors and numbers, so it is not opened") from error
    except Exception as error:  # of any kind: zipfile and torch raise many for files that others wrote
        raise _Unreadable(f"{file} is damaged ({' '.join(str(error).split())[:200]})") from error
    raise _Unreadable(f"{file} is damaged (its entry {damaged} was altered)")


def _lacking(state: Any) -> str:
    """What a state lacks to be that of a run."""
    wanted = {"state_dict": Mapping, "global_step": int, "callbacks": Mapping, "loops": Mapping, VERSION: str}
    has = state if isinstance(state, Mapping) else {}
    return ", ".join(key for key, kind in wanted.items() if not isinstance(has.get(key), kind))


def _is_sound(path: Path) -> bool:
    """Whether a run can resume from a checkpoint."""
    try:
        return not _lacking(_read(path))
    except _Unreadable:
        return False


def _attach_slices(state: Any, slices: Iterator[Sequence[Tensor]]) -> Any:
    """A nested state whose meta tensors are replaced by the slices, which have the same order."""
    if isinstance(state, Tensor):
        return SlicedTensor(next(slices)) if state.is_meta else state
    if isinstance(state, dict):
        values = {name: _attach_slices(value, slices) for name, value in state.items()}
        return LazyDict(values) if any(isinstance(value, SlicedTensor) for value in values.values()) else values
    if isinstance(state, list | tuple):
        return type(state)(_concatenated(_attach_slices(value, slices)) for value in state)
    return state


def _concatenated(value: Any) -> Any:
    return torch.cat(value.parts) if isinstance(value, SlicedTensor) else value


def _remove_slices(path: Path, keep: Sequence[str] = ()) -> None:
    """Also removes slices of a save that was killed. What cannot be removed is tried again at the next save."""
    folder = slices_folder(path)
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            if file.name not in keep:
                file.unlink()
        if not keep:
            folder.rmdir()


def _fsync_folder(folder: Path) -> None:
    """Makes a rename in the folder durable."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError that caused an error of torch's writer."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _write_error_message(file: Path, path: Path, error: OSError, needed: int) -> str:
    previous = f"; the previous {path.name} is intact" if path.is_file() else ""
    text = f"{file}: the checkpoint cannot be written ({error.strerror or error}){previous}. "
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with contextlib.suppress(OSError):
            text += f"It needs {_megabytes(needed)}, and {_megabytes(shutil.disk_usage(path.parent).free)} are free. "
    return text + "Make room, or set another run_dir, and continue with resume="


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _read_error_message(path: Path, why: str) -> str:
    others = sorted((other for other in path.parent.glob("*.ckpt") if other != path), reverse=True)
    sound = next(filter(_is_sound, others), None)
    return f"resume: {why}; start again with {f'resume={sound}' if sound else 'no resume'}"
