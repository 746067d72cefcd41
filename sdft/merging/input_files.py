"""The input files of a merge: threads hash them while weights are read, and both use the same pages.

Knows files, bytes and threads. Must not depend on what is computed.
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
"""Bytes that the hash of a file may be ahead of what was read from it. Hashing brings into the page cache what is read
next; pages that come too early are evicted before they are read."""

ReadWeight = Callable[[str], Tensor]
HashOf = Callable[[], str]


class OpenInputs:
    """Reads the weights of a recipe's inputs, and gives the hashes of their files.

    If memory cannot hold the files and the result, tensors are dropped from the page cache once they are used:
    otherwise a full cache would evict what is needed next. If it can, they stay cached for the next merge.
    """

    def __init__(self, sources: Mapping[str, Source], files: Mapping[Path, InputFile], hashes: Mapping[Path, HashOf]):
        self._files, self._hashes = files, hashes
        self._checkpoints = {
            name: source.checkpoint for name, source in sources.items() if isinstance(source, TensorSource)
        }
        self.readers: Mapping[str, ReadWeight] = {
            name: partial(self._read, checkpoint) for name, checkpoint in self._checkpoints.items()
        }
        """By source: a function that reads one weight. LoRAs have none, they are in memory."""

    def release(self, weight: str) -> None:
        """Report that a weight will not be read again."""
        for checkpoint in self._checkpoints.values():
            if weight in checkpoint.weights:
                stored = checkpoint.weights[weight].stored
                self._files[stored.file].release(stored)

    def hash_of(self, file: Path) -> str:
        """The SHA-256 of a file; to be called after the last read."""
        self._files[file].stop_waiting()
        return self._hashes[file]()

    def _read(self, checkpoint: Checkpoint, weight: str) -> Tensor:
        return checkpoint.read(weight, lambda stored: self._files[stored.file].mapped.tensor(stored))


class InputFile:
    """The progress of the hash and of the readers of one file.

    uses: how many sources read each tensor. keep_cached: leave the tensors in the page cache.
    """

    def __init__(self, path: Path, uses: Counter[StoredTensor], keep_cached: bool):
        self.mapped, self.uses, self.keep_cached = MappedFile(path), uses, keep_cached
        self.changed = Condition()
        self.num_hashed = self.num_released = 0
        self.max_lead: float = MAX_HASH_LEAD
        self.cancelled = False
        self.pages_to_drop: list[StoredTensor] = []
        """Released by all readers, to be dropped from the page cache once they are hashed."""

    def sha256(self, bar: tqdm) -> str:
        """The hash, computed at most `max_lead` bytes ahead of the readers. Raises CancelledError after `cancel`."""

        def on_progress(end: int) -> None:
            with self.changed:
                bar.update(end - self.num_hashed)
                self.num_hashed = end
                self._drop_pages()
                self.changed.wait_for(lambda: self.cancelled or end <= self.num_released + self.max_lead)
                if self.cancelled:
                    raise CancelledError

        return self.mapped.sha256(on_progress)

    def release(self, stored: StoredTensor) -> None:
        """One source will not read the tensor again."""
        with self.changed:
            self.uses[stored] -= 1
            if not self.uses[stored]:
                self.num_released += stored.num_bytes
                if not self.keep_cached:
                    self.pages_to_drop.append(stored)
                    self._drop_pages()
                self.changed.notify()

    def stop_waiting(self) -> None:
        """Lets the hash run to the end of the file."""
        with self.changed:
            self.max_lead = float("inf")
            self.changed.notify()

    def cancel(self) -> None:
        """Stops the hash."""
        with self.changed:
            self.cancelled = True
            self.changed.notify()

    def _drop_pages(self) -> None:
        done = [stored for stored in self.pages_to_drop if stored.start + stored.num_bytes <= self.num_hashed]
        for stored in done:
            self.pages_to_drop.remove(stored)
            self.mapped.drop_pages(stored)


@contextmanager
def open_inputs(sources: Mapping[str, Source], bar: tqdm, to_write: int = 0) -> Iterator[OpenInputs]:
    """The files of the sources, hashed by one thread each inside the `with`. to_write: bytes of the result."""
    paths = dict.fromkeys(file for source in sources.values() for file in source.files)
    checkpoints = [source.checkpoint for source in sources.values() if isinstance(source, TensorSource)]
    uses = Counter(view.stored for one in checkpoints for view in one.weights.values())
    keep_cached = sum(path.stat().st_size for path in paths) + to_write <= available_memory()
    files = {path: InputFile(path, uses, keep_cached) for path in paths}
    with ThreadPoolExecutor(len(files)) as pool:
        hashes = {path: pool.submit(file.sha256, bar).result for path, file in files.items()}
        try:
            yield OpenInputs(sources, files, hashes)
        finally:
            for file in files.values():
                file.cancel()
