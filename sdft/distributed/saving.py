"""Background checkpointing of a sharded model: each process writes its shards in a thread, rank 0 the rest.

Nothing here communicates with other processes, since collectives of a thread would mix with those of the training step:
rank 0 sees from the files themselves when all shards are written.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from sdft.formats.run_state import SLICE_FILES, slices_folder, write_slices, write_state

POLL_INTERVAL = 0.05
"""Seconds between two checks for the files of the other processes."""
GRACE_PERIOD = 60.0
"""Seconds to wait for the files of the other processes after an error, when they may be gone."""


class BackgroundSave:
    """One checkpoint that is being written.

    path: of the checkpoint. files: names of the shard files of all processes. own: the name of this process's file;
    None if it writes none. outline: the rest of the state, in the process that writes it; None in the others.
    """

    def __init__(self, path: Path, files: Sequence[str], own: str | None, slices: list[Tensor], outline: Any | None):
        self.path, self.files, self.own = path, files, own
        self._aborted = threading.Event()
        self._thread = ThreadPoolExecutor(1, "save")
        self._slices = self._thread.submit(write_slices, slices, path, own) if own else None
        self._rest = [self._thread.submit(self._commit, outline)] if outline is not None else []

    def then(self, action: Callable[[], None]) -> None:
        """Run `action` once the checkpoint is complete, in the process that completes it; never if it fails."""
        if self._rest:
            self._rest.append(self._thread.submit(self._after, self._rest[0], action))

    def own_error(self) -> BaseException | None:
        """Wait for this process's shards; their error, if any."""
        return self._slices.exception() if self._slices else None

    def error(self) -> BaseException | None:
        """Wait for the rest, which needs the shards of all processes; its error, if any."""
        return next(filter(None, (future.exception() for future in self._rest)), None)

    def abort(self) -> None:
        """Stop, and delete this process's shards: some other process failed to write its own."""
        self._aborted.set()
        self._thread.shutdown()
        if self.own:
            (slices_folder(self.path) / self.own).unlink(missing_ok=True)

    def finish_alone(self) -> None:
        """Complete the checkpoint as far as possible when the other processes may be gone."""
        late = threading.Timer(GRACE_PERIOD, self._aborted.set)
        error = self.own_error()
        if error is None:
            late.start()
            error = self.error()
            late.cancel()
        if error:
            warnings.warn(f"the last checkpoint was not completed: {error}", stacklevel=2)
        self._aborted.set()
        self._thread.shutdown()

    def _commit(self, outline: Any) -> None:
        files = [slices_folder(self.path) / name for name in self.files]
        while not all(file.is_file() for file in files):
            if self._aborted.wait(POLL_INTERVAL):
                raise TimeoutError(f"{self.path} lacks shards of other processes")
        write_state({**outline, SLICE_FILES: list(self.files)}, self.path)

    def _after(self, commit: Future, action: Callable[[], None]) -> None:
        commit.result()
        action()
