"""A content-addressed cache of tensors on disk.

An address is the SHA-256 of all inputs of an entry: bytes of the image, transform and VAE; token ids and text encoders.
A changed input has another address, so no entry is ever stale. Shards are written atomically, any number of processes
may write at the same time, and each process verifies the checksum of an entry at its first read.

Entries are read with `preadv` instead of from memory-mapped files, which wait for every few pages in random order.
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

from sdft.data.cache_index import CacheEntry, CacheIndex, TensorKind
from sdft.errors import UserError
from sdft.hardware import reuse_freed_memory

SHARD_BYTES = 256 * 2**20
"""A shard is written once this much is pending; a killed process loses at most that."""
MOST_OPEN = 256
"""Files that a process has open at a time; the usual limit is 1024."""
MOST_COMING = 4096
"""Announced entries that are remembered; those that other processes read stay until then."""
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Names of dtypes in safetensors."""
ARRAYS = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.float16: np.float16}
"""Dtypes of the arrays into which entries are read."""
HEX = re.compile("[0-9a-f]{16}")


class Cache:
    """A folder of safetensors shards, each entry with its checksum.

    folder: of the shards; created with the first one. shard_bytes: size from which a shard is written.
    """

    def __init__(self, folder: str | Path, shard_bytes: int = SHARD_BYTES):
        self.folder, self.shard_bytes = Path(folder).expanduser(), shard_bytes
        self._shards: list[Path] = []
        self._places = CacheIndex()
        self._sound = bytearray()
        """1 for each row whose checksum was verified."""
        self._coming: dict[str, tuple[int, CacheEntry]] = {}
        """places of addresses that were announced, so that they are searched once"""
        self._files: dict[int, FileIO] = {}
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self.refresh()
        reuse_freed_memory()

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, for workers that are spawned."""
        return vars(self) | {"_files": {}}

    def refresh(self) -> None:
        """Read the headers of shards that were written since."""
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
        """The addresses without an entry, without duplicates, in order."""
        return list(dict.fromkeys(address for address in addresses if address not in self))

    def __getitem__(self, address: str) -> Tensor:
        """The tensor of an address. Raises UserError if its checksum does not match."""
        coming = self._coming.pop(address, None)
        row, place = self._place(address) if coming is None else coming
        content = self._read(place)
        if not self._sound[row]:
            if place.checksum != checksum(content):
                raise self._damaged(place.shard, address)
            self._sound[row] = 1
        tensor = torch.from_numpy(content)
        return tensor.view(torch.bfloat16) if place.kind.dtype == torch.bfloat16 else tensor

    def prefetch(self, addresses: Iterable[str]) -> None:
        """Advise the system to read entries that will be needed soon: many at once are faster than one by one."""
        if len(self._coming) > MOST_COMING:  # those that other processes read stay here
            self._coming.clear()
        for address in addresses:
            _, place = self._coming[address] = self._place(address)
            if not self._in_memory(place):
                file = self._file(place.shard).fileno()
                os.posix_fadvise(file, place.first, place.kind.size, os.POSIX_FADV_WILLNEED)

    def _in_memory(self, place: CacheEntry) -> bool:
        """Whether the middle of an entry is in the page cache; testing costs less than advising."""
        middle = place.first + place.kind.size // 2
        try:
            return os.preadv(self._file(place.shard).fileno(), [bytearray(1)], middle, os.RWF_NOWAIT) == 1
        except OSError:
            return False  # not cached, or a file system without RWF_NOWAIT

    def put(self, address: str, tensor: Tensor) -> None:
        """Add an entry; it is on disk after `flush`, or once `shard_bytes` are pending."""
        self._pending[address] = tensor.detach().cpu().contiguous()
        self._pending_bytes += tensor.nbytes
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the pending entries as one shard. Raises UserError if that fails; earlier shards stay."""
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
                "before are kept: free some space, or set another data.cache_dir, and start again"
            ) from error
        self._pending, self._pending_bytes = {}, 0
        self.refresh()

    def _place(self, address: str) -> tuple[int, CacheEntry]:
        """(row, place) of an entry."""
        row = self._places.row(address)
        if row is None:
            raise KeyError(address)
        return row, self._places[row]

    def _read_header(self, number: int) -> None:
        """Add the entries of a shard to the index; safetensors validates the header."""
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
            found, _, kind_found = checksums.get(address, "").partition(" ")
            if kind_found != kind_text(dtype, shape) or not HEX.fullmatch(found):
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
        file, content = self._file(place.shard), np.empty(place.kind.shape, ARRAYS[place.kind.dtype])
        done = os.preadv(file.fileno(), [content.data], place.first)
        while done < content.nbytes:
            rest = content.reshape(-1).view(np.uint8)[done:]
            more = os.preadv(file.fileno(), [rest.data], place.first + done)
            if not more:
                raise self._damaged(place.shard, "the file is truncated")
            done += more
        return content

    def _damaged(self, number: int, what: str) -> UserError:
        return UserError(
            f"data.cache_dir: {self._shards[number]} is damaged ({what}); remove this file, and its entries are "
            "computed again"
        )


def checksum(content: np.ndarray) -> int:
    """XXH3 of the bytes of an array, 64 bits."""
    return xxhash.xxh3_64_intdigest(content.data)


def described(tensor: Tensor) -> str:
    """The metadata of an entry: its checksum, dtype and shape."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    found = checksum(tensor.flatten().view(torch.uint8).numpy())
    return f"{found:016x} {kind_text(names[tensor.dtype], tensor.shape)}"


def kind_text(dtype: str, shape: Sequence[int]) -> str:
    """Dtype and shape as stored beside the checksum, which does not cover them."""
    return f"{dtype} {'x'.join(map(str, shape))}"


def digest(ingredients: object) -> str:
    """SHA-256 of anything that JSON can represent."""
    return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()


def fingerprint(*modules: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and values of all weights of some modules."""
    found = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
