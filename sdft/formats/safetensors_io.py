"""safetensors files: reads headers, memory-maps tensors, writes one tensor at a time.

Knows bytes, dtypes and paths. Must not depend on what the tensors are.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdft.errors import UserError
from sdft.progress import tqdm

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The supported floating-point dtypes by their names in files; 8-bit floats are not supported, they need a scale."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
DTYPE_NAMES |= {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8"}
ITEM_SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
"""Bytes of one element; 1 for all other dtypes."""
CHUNK = 2**20
HASH_KEY = "modelspec.hash_sha256"


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return ITEM_SIZES.get(self.dtype, 1) * torch.Size(self.shape).numel()


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor in a file."""

    file: Path
    name: str
    start: int = 0
    """The offset of its bytes in the file."""


def tensor_info(tensor: Tensor) -> TensorInfo:
    """Dtype and shape of a tensor, as a file states them."""
    return TensorInfo(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape))


def read_header(where: str, file: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    """Tensors and metadata of one file, in the order of their bytes. Raises UserError, which starts with `where`."""
    try:
        with safe_open(file, framework="pt"):  # checks the header against the size of the file
            pass
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            begin = opened.tell()
    except (SafetensorError, OSError) as error:
        problem = f"is truncated or not a safetensors file ({error})"
        raise UserError(f"{where}: {file.name} {problem}; get it again") from error
    metadata = header.pop("__metadata__", None) or {}
    stored = [
        StoredTensor(entry["dtype"], tuple(entry["shape"]), file, name, begin + entry["data_offsets"][0])
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    ]
    return stored, metadata


def write_tensors(
    path: Path,
    entries: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    compute: Callable[[str], Tensor],
    bar: tqdm | None = None,
) -> None:
    """Write a safetensors file; `compute` is called with the name of one tensor at a time.

    If `metadata` has the key modelspec.hash_sha256, its value is replaced by the hash of the tensors' bytes.
    """
    # The widest dtype first, as the library writes it: each tensor then starts at a multiple of its dtype's size.
    order = sorted(entries, key=lambda name: (-ITEM_SIZES.get(entries[name].dtype, 1), name))
    metadata = dict(metadata) | ({HASH_KEY: "0x" + "0" * 64} if HASH_KEY in metadata else {})
    digest = hashlib.sha256() if HASH_KEY in metadata else None
    with path.open("wb") as file:
        file.write(header_bytes(entries, order, metadata))
        for name in order:
            tensor = compute(name).detach().to("cpu", DTYPES.get(entries[name].dtype)).contiguous()
            content = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
            if len(content) != entries[name].num_bytes:
                raise ValueError(f"{name}: {list(tensor.shape)} {tensor.dtype} does not match the header")
            file.write(content)
            if digest:
                digest.update(content)
            if bar is not None:
                bar.update(len(content))
        if digest:
            file.seek(0)
            file.write(header_bytes(entries, order, metadata | {HASH_KEY: "0x" + digest.hexdigest()}))
        file.flush()
        os.fsync(file.fileno())


def header_bytes(entries: Mapping[str, TensorInfo], order: list[str], metadata: Mapping[str, str]) -> bytes:
    """The header, with its length, of a file with `entries` in this order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + entries[name].num_bytes
        header[name] = {"dtype": entries[name].dtype, "shape": list(entries[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def copy_with_metadata(source: Path, target: Path, added: Mapping[str, str]) -> None:
    """Copy a safetensors file with more metadata, or other values of it; the bytes of its tensors stay the same."""
    with source.open("rb") as read, target.open("wb") as written:
        header = json.loads(read.read(int.from_bytes(read.read(8), "little")))
        header = {"__metadata__": {**header.pop("__metadata__", {}), **added}, **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        written.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(read, written, CHUNK)
        written.flush()
        os.fsync(written.fileno())


def refuse_nonfinite(where: str, name: str, tensor: Tensor) -> None:
    """Raise UserError that names a tensor with NaN or infinite values, which spoil whatever they are added to."""
    # Minimum and maximum: half the time of isfinite, and NaN propagates to both.
    if tensor.is_floating_point() and tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        raise UserError(f"{where}: {name} has values that are NaN or infinite, so the file is damaged; get it again")


class MappedFile:
    """A memory-mapped file."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            # Copy-on-write, though nothing writes: torch warns of read-only memory.
            self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.content.madvise(mmap.MADV_SEQUENTIAL)

    def tensor(self, stored: StoredTensor) -> Tensor:
        """A tensor of the file, as a view of the mapped memory."""
        size = torch.Size(stored.shape)
        return torch.frombuffer(
            self.content, dtype=DTYPES[stored.dtype], count=size.numel(), offset=stored.start
        ).view(size)

    def drop_pages(self, stored: StoredTensor) -> None:
        """Drop the pages of a tensor from memory and page cache; a later access reads them again."""
        first = -(-stored.start // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (stored.start + stored.num_bytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if size > 0:
            self.content.madvise(mmap.MADV_DONTNEED, first, size)
            with self.path.open("rb") as file:
                os.posix_fadvise(file.fileno(), first, size, os.POSIX_FADV_DONTNEED)

    def sha256(self, on_progress: Callable[[int], object]) -> str:
        """The hash of the file; `on_progress` gets the number of bytes done. A copy would take a third longer."""
        digest = hashlib.sha256()
        with memoryview(self.content) as content:
            for start in range(0, len(content), CHUNK):
                with content[start : start + CHUNK] as part:
                    digest.update(part)
                on_progress(min(start + CHUNK, len(content)))
        return digest.hexdigest()
