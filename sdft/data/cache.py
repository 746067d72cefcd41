"""Tensors on disk under the address of everything they were made from.

An address is the SHA-256 of its ingredients: bytes of the picture, transform, VAE; text as the tokenizers read it,
encoders. What changes gets another address, so nothing stale can be found. Shards are written whole or not at all, any
number of processes may write at once, and every entry is checked when a process first reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sdft.types import UserError

SHARD_BYTES = 256 * 2**20
"""A shard is written when this much is ready; a killed build loses no more."""


class Cache:
    """A folder of safetensors shards, each entry with its CRC-32.

    folder: where the shards lie.
    """

    def __init__(self, folder: str | Path, shard_bytes: int = SHARD_BYTES):
        self.folder, self.shard_bytes = Path(folder).expanduser(), shard_bytes
        self._shards: list[Path] = []
        self._places: dict[str, int] = {}
        self._forget()
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self.refresh()

    def _forget(self) -> None:
        self._opened: dict[int, tuple] = {}
        self._sound: set[str] = set()
        self._process = os.getpid()

    def refresh(self) -> None:
        """Find what other processes have written."""
        known = set(self._shards)
        for shard in sorted(self.folder.glob("*.safetensors")):
            if shard not in known:
                self._shards.append(shard)
                number = len(self._shards) - 1
                self._places.update(dict.fromkeys(self._open(number)[0].keys(), number))

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, address: str) -> bool:
        return address in self._places or address in self._pending

    def missing(self, addresses: Iterable[str]) -> list[str]:
        """The addresses that have no entry, each once, in their order."""
        return [address for address in dict.fromkeys(addresses) if address not in self]

    def __getitem__(self, address: str) -> Tensor:
        """An entry. Raises UserError with its shard where its bytes are not those that were written."""
        if self._process != os.getpid():
            self._forget()  # a worker opens and checks for itself
        number = self._places[address]
        shard, checksums = self._open(number)
        try:
            tensor = shard.get_tensor(address)
        except SafetensorError as error:
            raise self._damaged(number, f"{address}: {error}") from error
        if address not in self._sound:
            if checksums.get(address) != checksum(tensor):
                raise self._damaged(number, address)
            self._sound.add(address)
        return tensor

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
        content = save(self._pending, {address: checksum(tensor) for address, tensor in self._pending.items()})
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

    def _open(self, number: int) -> tuple:
        if number not in self._opened:
            try:
                shard = safe_open(self._shards[number], framework="pt")
                self._opened[number] = shard, shard.metadata() or {}
            except (SafetensorError, OSError) as error:
                raise self._damaged(number, str(error)) from error
        return self._opened[number]

    def _damaged(self, number: int, what: str) -> UserError:
        return UserError(
            f"data.cache_dir: {self._shards[number]} is damaged ({what}); remove this file, and its entries are made "
            "again"
        )


def checksum(tensor: Tensor) -> str:
    """CRC-32 of the bytes of a tensor."""
    return f"{zlib.crc32(tensor.flatten().view(torch.uint8).numpy()):08x}"


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
