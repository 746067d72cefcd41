"""Writes the result of a recipe as a model: offsets are known beforehand, so threads write tensors in any order.

Knows the layout of both model formats. Must not depend on how the numbers are computed (`compute`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sdft.errors import UserError
from sdft.formats.keys import Layout, mapping_for_weight
from sdft.formats.model_checkpoint import LOGIT_SCALE, Checkpoint
from sdft.formats.safetensors_io import DTYPE_NAMES, DTYPES, HASH_KEY, ITEM_SIZES, TensorInfo, header_bytes, tensor_info
from sdft.formats.single_file import file_metadata, logit_scale, marks, single_entry
from sdft.hardware import reuse_freed_memory
from sdft.progress import tqdm

DATE = "modelspec.date"
ChunksOf = Callable[[str], Iterator[Tensor]]
"""A weight, `part/name` -> its chunks, along the first axis."""


@dataclass
class OutputFile:
    """One file to write."""

    path: str
    """Relative to the folder; empty for a single file."""
    metadata: dict[str, str]
    entries: dict[str, TensorInfo] = field(default_factory=dict)
    weights: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By tensor: the weights that it consists of, one after the other."""
    layouts: dict[str, Layout] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    """Tensors that do not depend on the merge."""

    @property
    def order(self) -> list[str]:
        """The order of the tensors: the widest dtype first, so that each starts at a multiple of its item size."""
        return sorted(self.entries, key=lambda name: (-ITEM_SIZES.get(self.entries[name].dtype, 1), name))

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries.values())


def plan_outputs(like: Checkpoint, to: str, dtype: torch.dtype | None) -> list[OutputFile]:
    """The files of a model with the weights of `like`, in `dtype` or else in the dtypes of `like`."""
    if to == "folder":
        # Imports diffusers, which takes seconds and is not needed for a single file.
        from sdft.formats.diffusers_folder import FILES, part_metadata

        outputs = [OutputFile(f"{part}/{file}", part_metadata(part, like)) for part, file in FILES.items()]
        for output in outputs:
            part = output.path.split("/")[0]
            for weight, view in like.weights.items():
                if weight.startswith(f"{part}/"):
                    name = weight.removeprefix(f"{part}/")
                    output.entries[name] = TensorInfo(DTYPE_NAMES[dtype] if dtype else view.dtype, view.shape)
                    output.weights[name] = (weight,)
        return outputs
    output = OutputFile("", {key: value for key, value in file_metadata(like).items() if key not in (HASH_KEY, DATE)})
    for weight in like.weights:
        part, _, name = weight.partition("/")
        place = mapping_for_weight(part, name, like.num_vae_levels)
        output.entries[place.single] = single_entry(like, place, dtype)
        output.weights[place.single], output.layouts[place.single] = place.weights, place.layout
    output.constants = marks(like) | {LOGIT_SCALE: logit_scale(like, output.entries, dtype)}
    output.entries |= {name: tensor_info(tensor) for name, tensor in output.constants.items()}
    return [output]


def write_outputs(
    outputs: list[OutputFile],
    target: Path,
    chunks: ChunksOf,
    explain_nonfinite: Callable[[str], str],
    threads: int,
    placeholders: Mapping[str, str],
    final_metadata: Callable[[], Mapping[str, str]],
    bar: tqdm,
) -> None:
    """Write the files; `target` is the file, or the folder that has its other files already.

    explain_nonfinite: gives the error message for a weight whose result is NaN or infinite.
    final_metadata: more metadata, known only at the end. placeholders: the same with values of the same length.
    """
    jobs, files = [], []
    with ExitStack() as stack:
        for output in outputs:
            # Unbuffered: threads write at offsets.
            opened = stack.enter_context((target / output.path if output.path else target).open("wb", buffering=0))
            files.append(opened.fileno())
            head = header_bytes(output.entries, output.order, output.metadata | dict(placeholders))
            # Reserves the space, so that a full disk is found before the computation.
            os.posix_fallocate(opened.fileno(), 0, len(head) + output.num_bytes)
            offset = len(head)
            for name in output.order:
                at = opened.fileno(), offset
                jobs.append(partial(write_tensor, output, name, *at, chunks, explain_nonfinite, bar))
                offset += output.entries[name].num_bytes
        run_in_threads(jobs, threads)
        more = dict(final_metadata())
        for output, descriptor in zip(outputs, files, strict=True):
            os.pwrite(descriptor, header_bytes(output.entries, output.order, output.metadata | more), 0)
            os.fsync(descriptor)


def run_in_threads(jobs: Sequence[Callable[[], None]], threads: int) -> None:
    """Run all jobs, each on one core; after an error no further job starts."""
    reuse_freed_memory()
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(num_threads)


@torch.no_grad()
def write_tensor(
    output: OutputFile,
    name: str,
    descriptor: int,
    offset: int,
    chunks: ChunksOf,
    explain_nonfinite: Callable[[str], str],
    bar: tqdm,
) -> None:
    """Compute one tensor and write it at `offset`."""
    dtype = DTYPES.get(output.entries[name].dtype)
    if name in output.constants:
        write_at(output.constants[name], descriptor, offset)
        return
    for weight in output.weights[name]:
        values = chunks(weight)
        if output.layouts.get(name) == "transposed":
            values = iter([torch.cat(list(values)).T])
        for chunk in values:
            narrow = chunk.to(dtype)
            # Rounding is monotonic, so checking minimum and maximum is enough, and much faster; NaN propagates to both.
            if not torch.stack(torch.aminmax(chunk)).to(dtype).isfinite().all():
                if not chunk.isfinite().all():
                    raise UserError(explain_nonfinite(weight))
                largest = float(chunk.abs().max())
                raise UserError(f"{weight}: a value of {largest:g} is too large for its dtype; pass dtype=fp32")
            offset += write_at(narrow, descriptor, offset)
            bar.update(narrow.nbytes)
    # Starts writing to disk now, not at the fsync, and frees the pages that are written.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def write_at(tensor: Tensor, descriptor: int, offset: int) -> int:
    """Write a tensor at an offset of a file; returns the number of bytes."""
    content = memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], offset + written)
    return written


def plan_lines(outputs: list[OutputFile]) -> Iterator[str]:
    """The plan of a dry run: one line for each tensor, and one for each file."""
    for output in outputs:
        for name in output.order:
            entry = output.entries[name]
            yield f"  {name}  {entry.dtype} {list(entry.shape)}  {entry.num_bytes} bytes"
        yield f"{output.path or 'the file'}: {len(output.entries)} tensors, {output.num_bytes / 2**20:.1f} MiB"


def to_json(recipe: Mapping[str, object]) -> str:
    """JSON for metadata; equal content gives equal text."""
    return json.dumps(recipe, sort_keys=True, ensure_ascii=False)

