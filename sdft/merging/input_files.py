"""The files of a merge: hashed from end to end and read weight by weight, side by side; what both have used may go.

Knows files, bytes and threads; must not know what is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Condition

from torch import Tensor

from sdft.formats.model_checkpoint import Checkpoint
from sdft.formats.safetensors_io import MappedFile, StoredTensor
from sdft.hardware import available_memory
from sdft.merging.sources import Source, TensorSource
from sdft.progress import tqdm

MAX_HASH_LEAD = 2**29
"""Bytes that the hash of a file may be ahead of what was read from it. It brings into the page cache what is read next,
and what comes too early has left it when it is wanted."""

ReadWeight = Callable[[str], Tensor]
Hash = Callable[[], str]


class OpenInputs:
    """What a recipe reads.

    Where memory cannot hold the files and the result, they leave the page cache as they are used: a full cache would
    give away what is wanted next. Else they stay, for the next merge of them.
    """

    def __init__(self, sources: Mapping[str, Source], files: Mapping[Path, InputFile], hashes: Mapping[Path, Hash]):
        self._files, self._hashes = files, hashes
        self._held = {name: source.checkpoint for name, source in sources.items() if isinstance(source, TensorSource)}
        self.readers: Mapping[str, ReadWeight] = {name: partial(self._read, held) for name, held in self._held.items()}
        """Of each source that holds weights one by one."""

    def release(self, weight: str) -> None:
        """No more of a weight is read."""
        for held in self._held.values():
            if weight in held.weights:
                stored = held.weights[weight].stored
                self._files[stored.file].release(stored)

    def hash_of(self, file: Path) -> str:
        """The SHA-256 of a file. Nothing is read any more when it is asked for."""
        self._files[file].stop_waiting()
        return self._hashes[file]()

    def _read(self, held: Checkpoint, weight: str) -> Tensor:
        return held.read(weight, lambda stored: self._files[stored.file].mapped.tensor(stored))


class InputFile:
    """How far the hash and the readers of a file have come."""

    def __init__(self, path: Path, uses: Counter[StoredTensor], keep: bool):
        self.mapped, self.uses, self.keep = MappedFile(path), uses, keep
        self.changed = Condition()
        self.num_hashed = self.num_released = 0
        self.ahead: float = MAX_HASH_LEAD
        self.cancelled = False
        self.pages_to_drop: list[StoredTensor] = []
        """Used by all who read it, and to be forgotten."""

    def sha256(self, bar: tqdm) -> str:
        """The hash, which waits for those who read. Raises CancelledError when it is given up."""

        def on_progress(end: int) -> None:
            with self.changed:
                bar.update(end - self.num_hashed)
                self.num_hashed = end
                self._drop_pages()
                self.changed.wait_for(lambda: self.cancelled or end <= self.num_released + self.ahead)
                if self.cancelled:
                    raise CancelledError

        return self.mapped.sha256(on_progress)

    def release(self, stored: StoredTensor) -> None:
        with self.changed:
            self.uses[stored] -= 1
            if not self.uses[stored]:
                self.num_released += stored.num_bytes
                if not self.keep:
                    self.pages_to_drop.append(stored)
                    self._drop_pages()
                self.changed.notify()

    def stop_waiting(self) -> None:
        """The hash waits no more."""
        with self.changed:
            self.ahead = float("inf")
            self.changed.notify()

    def cancel(self) -> None:
        """The hash ends where it is."""
        with self.changed:
            self.cancelled = True
            self.changed.notify()

    def _drop_pages(self) -> None:
        done = [stored for stored in self.pages_to_drop if stored.start + stored.num_bytes <= self.num_hashed]
        for stored in done:
            self.pages_to_drop.remove(stored)
            self.mapped.drop_pages(stored)


@contextmanager
def opened(sources: Mapping[str, Source], bar: tqdm, to_write: int = 0) -> Iterator[OpenInputs]:
    """The files of the sources, while threads of their own hash them. to_write: the bytes of the result."""
    paths = dict.fromkeys(file for source in sources.values() for file in source.files)
    held = [source.checkpoint for source in sources.values() if isinstance(source, TensorSource)]
    uses = Counter(view.stored for one in held for view in one.weights.values())
    keep = sum(path.stat().st_size for path in paths) + to_write <= available_memory()
    files = {path: InputFile(path, uses, keep) for path in paths}
    with ThreadPoolExecutor(len(files)) as pool:
        hashes = {path: pool.submit(file.sha256, bar).result for path, file in files.items()}
        try:
            yield OpenInputs(sources, files, hashes)
        finally:
            for file in files.values():
                file.cancel()
