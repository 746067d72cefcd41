"""Tensors on disk under the address of everything they were made from.

An address is the SHA-256 of its ingredients: bytes of the picture, transform, VAE; text as the tokenizers read it,
encoders. What changes gets another address, so nothing stale can be found. Shards are written whole or not at all, any
number of processes may write at once, and every entry is checked when a process first reads it.

Entries are read by position, not from mapped files: in the random order of a run these wait for every few pages.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sdft.data.cache_index import TensorKind, CacheEntry, CacheIndex
from sdft.errors import UserError
from sdft.hardware import reuse_freed_memory

SHARD_BYTES = 256 * 2**20
"""A shard is written when this much is ready; a killed build loses no more."""
MOST_OPEN = 256
"""Files that a process keeps open: systems allow 1024."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Numbers as safetensors calls them."""
HEX = re.compile("[0-9a-f]{16}")


class Cache:
    """A folder of safetensors shards, each entry with its checksum.

    folder: where the shards lie.
    """

    def __init__(self, folder: str | Path, shard_bytes: int = SHARD_BYTES):
        self.folder, self.shard_bytes = Path(folder).expanduser(), shard_bytes
        self._shards: list[Path] = []
        self._places = CacheIndex()
        self._sound = bytearray()
        """1 for each place whose bytes were compared with their checksum."""
        self._files: dict[int, FileIO] = {}
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self.refresh()
        reuse_freed_memory()

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, for a worker that is no fork."""
        return vars(self) | {"_files": {}}

    def refresh(self) -> None:
        """Find what other processes have written."""
        known = set(self._shards)
        for shard in sorted(self.folder.glob("*.safetensors")):
            if shard not in known:
                self._shards.append(shard)
                self._read_header(len(self._shards) - 1)
        self._sound.extend(bytes(len(self._places) - len(self._sound)))

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, address: str) -> bool:
        return address in self._pending or self._places.row(address) is not None

    def missing(self, addresses: Iterable[str]) -> list[str]:
        """The addresses that have no entry, each once, in their order."""
        return list(dict.fromkeys(address for address in addresses if address not in self))

    def __getitem__(self, address: str) -> Tensor:
        """An entry. Raises UserError with its shard where its bytes are not what was written."""
        row = self._row(address)
        place = self._places[row]
        content = self._read(place)
        if not self._sound[row]:
            if place.checksum != checksum(content):
                raise self._damaged(place.shard, address)
            self._sound[row] = 1
        return torch.frombuffer(content, dtype=place.kind.dtype).view(place.kind.shape)

    def prefetch(self, addresses: Iterable[str]) -> None:
        """Entries that will be read next: a disk brings many at once sooner than one after the other."""
        for address in addresses:
            place = self._places[self._row(address)]
            if not self._at_hand(place):
                file = self._file(place.shard).fileno()
                os.posix_fadvise(file, place.first, place.kind.size, os.POSIX_FADV_WILLNEED)

    def _at_hand(self, place: CacheEntry) -> bool:
        """Whether the system has an entry in memory, going by its middle; to ask costs less than to advise."""
        middle = place.first + place.kind.size // 2
        try:
            return os.preadv(self._file(place.shard).fileno(), [bytearray(1)], middle, os.RWF_NOWAIT) == 1
        except OSError:
            return False  # not there, or a file system that does not tell

    def put(self, address: str, tensor: Tensor) -> None:
        """Keep an entry; it is on disk after `flush`, or when enough have come together."""
        self._pending[address] = tensor.detach().cpu().contiguous()
        self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one shard."""
        if not self._pending:
            return
        name = digest(sorted(self._pending))[:24]
        target = self.folder / f"{name}.safetensors"
        partial = self.folder / f".{name}.{os.getpid()}.partial"
        content = save(self._pending, {address: described(tensor) for address, tensor in self._pending.items()})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise UserError(
                f"data.cache_dir: {target} cannot be written ({error.strerror}); the {len(self)} entries written "
                "before are kept: make room, or set another data.cache_dir, and start again"
            ) from error
        self._pending, self._pending_bytes = {}, 0
        self.refresh()

    def _row(self, address: str) -> int:
        row = self._places.row(address)
        if row is None:
            raise KeyError(address)
        return row

    def _read_header(self, number: int) -> None:
        """Find the entries of a shard. What is written in its header is checked by safetensors."""
        shard = self._shards[number]
        try:
            with safe_open(shard, framework="pt") as checked:
                checksums = checked.metadata() or {}
            with shard.open("rb") as file:
                begin = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(begin))
        except (SafetensorError, OSError) as error:
            raise self._damaged(number, str(error)) from error
        header.pop("__metadata__", None)
        for address, entry in header.items():
            first, end = entry["data_offsets"]
            dtype, shape = entry["dtype"], entry["shape"]
            found, _, said = checksums.get(address, "").partition(" ")
            if said != kind_text(dtype, shape) or not HEX.fullmatch(found):
                raise self._damaged(number, address)
            kind = TensorKind(end - first, DTYPES[dtype], tuple(shape))
            self._places.add(address, CacheEntry(number, 8 + begin + first, kind, int(found, 16)))

    def _file(self, number: int) -> FileIO:
        file = self._files.get(number)
        if file is None:
            if len(self._files) == MOST_OPEN:
                self._files.pop(next(iter(self._files))).close()
            file = self._files[number] = self._shards[number].open("rb", buffering=0)
        return file

    def _read(self, place: CacheEntry) -> np.ndarray:
        file, content = self._file(place.shard), np.empty(place.kind.size, np.uint8)
        done = os.preadv(file.fileno(), [content.data], place.first)
        while done < len(content):
            more = os.preadv(file.fileno(), [content[done:].data], place.first + done)
            if not more:
                raise self._damaged(place.shard, "it ends too early")
            done += more
        return content

    def _damaged(self, number: int, what: str) -> UserError:
        return UserError(
            f"data.cache_dir: {self._shards[number]} is damaged ({what}); remove this file, and its entries are made "
            "again"
        )


def checksum(content: np.ndarray) -> int:
    """XXH3 of bytes: 64 bits, as fast as memory."""
    return xxhash.xxh3_64_intdigest(content.data)


def described(tensor: Tensor) -> str:
    """The checksum and kind of an entry that is written."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    found = checksum(tensor.flatten().view(torch.uint8).numpy())
    return f"{found:016x} {told_kind(names[tensor.dtype], tensor.shape)}"


def kind_text(dtype: str, shape: Sequence[int]) -> str:
    """What stands behind the checksum of an entry, as nothing else in the file checks it."""
    return f"{dtype} {'x'.join(map(str, shape))}"


def digest(ingredients: object) -> str:
    """The SHA-256 of anything JSON can hold."""
    return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()


def fingerprint(*modules: nn.Module) -> str:
    """What the weights of some modules are: names, types, shapes and every byte."""
    found = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
