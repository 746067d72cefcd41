"""A run folder belongs to one process at a time: a lock that says who has it, on this machine or on another.

The folder is locked by the system (`flock`), which ends with the process, however that ends. Not every network file
system does that for several machines, so `.lock` names the owner as well: host, boot, process and its start, and a
count that the owner raises every few seconds. A lock is stale if its process is gone, or, on another machine, if the
count stands still.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdft.distributed.processes import ProcessInfo
from sdft.errors import UserError

NAME = ".lock"
BEAT = 3.0
"""Seconds between two counts."""
STALE = 15.0
"""Seconds without a count after which the owner on another machine is taken for dead."""
WIDTH = 512
"""Bytes of the file: it is written in place, so that no reader finds it half written."""

_held: set[Path] = set()
"""Folders that this process has."""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Own an existing run folder inside of the context. Only the first process of a run takes the lock.

    Raises UserError, at once or within STALE seconds, if another run owns it. May be entered again by its owner.
    """
    folder = folder.resolve()
    if ProcessInfo.current().rank > 0 or folder in _held or not folder.is_dir():
        yield
        return
    handle = _lock_folder(folder)
    try:
        _refuse_owner_elsewhere(folder)
        file = folder / NAME
        owner = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "began": _began(os.getpid())}
        owner |= {"started": time.strftime("%Y-%m-%d %H:%M:%S"), "count": 0}
        try:
            _write(file, owner)
        except OSError as error:
            why = f"{file} cannot be written ({error.strerror})"
            raise UserError(f"{why}; free space, or name another folder") from error
        if handle is None:
            _refuse_later_owner(folder, owner)
        _held.add(folder)
        ended = threading.Event()
        beating = threading.Thread(target=_beat, args=(file, owner, ended), daemon=True)
        beating.start()
        try:
            yield
        finally:
            ended.set()
            beating.join()
            _held.discard(folder)
            file.unlink(missing_ok=True)
    finally:
        if handle is not None:
            os.close(handle)


def refuse_if_locked(folder: Path) -> None:
    """Raise UserError if another run owns the folder. Writes nothing."""
    folder = folder.resolve()
    if ProcessInfo.current().rank == 0 and folder not in _held and (folder / NAME).is_file():
        handle = _lock_folder(folder)
        if handle is not None:
            os.close(handle)
        _refuse_owner_elsewhere(folder)


def _lock_folder(folder: Path) -> int | None:
    """An open handle that has the system's lock of the folder; None where the file system has no such locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise _taken(folder, _read(folder / NAME)) from None
    except OSError:
        os.close(handle)
        return None
    return handle


def _refuse_owner_elsewhere(folder: Path) -> None:
    """Raise UserError if `.lock` names a process that lives. Waits for STALE seconds for one on another machine."""
    owner = _read(folder / NAME)
    if owner is None:
        return
    if (owner.get("host"), owner.get("boot")) == (socket.gethostname(), _boot()):
        # The system's lock may not reach from one container of this machine to the other.
        if owner.get("pid") != os.getpid() and _began(owner.get("pid")) == owner.get("began") is not None:
            raise _taken(folder, owner)
        return
    print(f"{folder}: was locked by {owner.get('host')}; looking whether that run still lives", file=sys.stderr)
    until = time.monotonic() + STALE
    while time.monotonic() < until:
        time.sleep(0.5)
        seen = _read(folder / NAME)
        if seen is None:
            return
        if seen != owner:
            raise _taken(folder, seen)


def _refuse_later_owner(folder: Path, owner: dict[str, Any]) -> None:
    """Without locks of the system, two processes may both find no owner: the one that wrote last has the folder."""
    time.sleep(1.0)
    seen = _read(folder / NAME)
    if seen is not None and any(seen.get(key) != owner[key] for key in ("host", "boot", "pid")):
        raise _taken(folder, seen)


def _taken(folder: Path, owner: dict[str, Any] | None) -> UserError:
    who = "another process"
    if owner is not None:
        who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('started')}"
    return UserError(f"{folder}: {who} runs here; wait for its end, stop it, or name another folder")


def _beat(file: Path, owner: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        owner["count"] += 1
        with contextlib.suppress(OSError):  # of a disk that is full for a while
            _write(file, owner)


def _write(file: Path, owner: dict[str, Any]) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(handle, json.dumps(owner).ljust(WIDTH).encode(), 0)
        os.ftruncate(handle, WIDTH)
    finally:
        os.close(handle)


def _read(file: Path) -> dict[str, Any] | None:
    """The owner that a lock names; None if there is none, or if it says nothing that can be read."""
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return owner if isinstance(owner, dict) else None


def _boot() -> str:
    """Changes when the machine starts again, after which processes have the numbers of earlier ones."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _began(pid: object) -> str | None:
    """When a process of this machine started, in ticks since its boot; None if there is no such process."""
    if not isinstance(pid, int) or not 0 < pid < 2**31:
        return None
    try:
        # Field 22; the second one is a name in brackets, which may hold spaces and brackets.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except OSError as error:
        return "unknown" if isinstance(error, PermissionError) else None
    return "unknown"
