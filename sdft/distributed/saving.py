"""A save of a divided model, written while training goes on: each process its slices, the first one the rest.

Knows threads and files; must not know what is saved. Nothing here talks to other processes, as its words would mix with
those of the training step: the files themselves tell the first process when all slices are there.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from sdft.formats.training_checkpoint import SLICE_FILES, slices_folder, write_slices, write_state

LOOK_EVERY = 0.05
"""Seconds between two looks for the slices of the others."""
PATIENCE = 60.0
"""Seconds that slices of the others may be late when the run ends by an error, and nobody can be asked."""


class BackgroundSave:
    """One save under way in a thread.

    path: of the state. files: names of all files of slices, from all processes. own: the name of this process's, None
    where it writes none. outline: the rest of the state, where this process writes it.
    """

    def __init__(self, path: Path, files: Sequence[str], own: str | None, slices: list[Tensor], outline: Any | None):
        self.path, self.files, self.own = path, files, own
        self._given_up = threading.Event()
        self._thread = ThreadPoolExecutor(1, "save")
        self._slices = self._thread.submit(write_slices, slices, path, own) if own else None
        self._rest = [self._thread.submit(self._commit, outline)] if outline is not None else []

    def then(self, action: Callable[[], None]) -> None:
        """Do something as soon as the save is whole, and not otherwise; in the process that completes it."""
        if self._rest:
            self._rest.append(self._thread.submit(self._after, self._rest[0], action))

    def own_error(self) -> BaseException | None:
        """Waits for this process's slices."""
        return self._slices.exception() if self._slices else None

    def problem(self) -> BaseException | None:
        """Waits for the rest: only when the slices of all are there."""
        return next(filter(None, (future.exception() for future in self._rest)), None)

    def abort(self) -> None:
        """Leave nothing of it; where its slices failed, so that nothing names them."""
        self._given_up.set()
        self._thread.shutdown()
        if self.own:
            (slices_folder(self.path) / self.own).unlink(missing_ok=True)

    def finish_without_others(self) -> None:
        """What can still be done at the end of a process when the others may be gone."""
        late = threading.Timer(PATIENCE, self._given_up.set)
        problem = self.own_error()
        if problem is None:
            late.start()
            problem = self.problem()
            late.cancel()
        if problem:
            warnings.warn(f"the last save was not completed: {problem}", stacklevel=2)
        self._given_up.set()
        self._thread.shutdown()

    def _commit(self, outline: Any) -> None:
        files = [slices_folder(self.path) / name for name in self.files]
        while not all(file.is_file() for file in files):
            if self._given_up.wait(LOOK_EVERY):
                raise TimeoutError(f"{self.path} lacks slices of other processes")
        write_state({**outline, SLICE_FILES: list(self.files)}, self.path)

    def _after(self, commit: Future, action: Callable[[], None]) -> None:
        commit.result()
        action()
