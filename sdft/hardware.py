"""What this machine offers: available memory, and the precision in which it computes fast."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sdft.errors import UserError
from sdft.types import Precision

CGROUPS = Path("/sys/fs/cgroup")


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`; to a GPU from pinned memory, so that the host does not wait for what the GPU does."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def reuse_freed_memory() -> None:
    """Let it be kept for the next block of about that size: page faults cost as much as the reading or arithmetic.

    glibc does so once a block of just under 32 MiB was freed (mallopt(3), M_MMAP_THRESHOLD); elsewhere nothing happens.
    """
    block = torch.empty(31 * 2**20, dtype=torch.uint8)
    del block


def available_memory() -> float:
    """Bytes of memory that this process can still get, from the system and in its control group; infinity if unknown.

    A job of SLURM or a container may have less than the machine.
    """
    try:
        rows = Path("/proc/meminfo").read_text().splitlines()
        free = next((int(row.split()[1]) * 2**10 for row in rows if row.startswith("MemAvailable")), float("inf"))
    except OSError:
        free = float("inf")
    return min([free, *_left_in_groups()])


def _left_in_groups() -> Iterator[float]:
    """Bytes left in each control group that this process is in and that has a limit."""
    for root, own, names in own_cgroups():
        limit_name, used_name, cache_name = names
        for folder in (root / own, *(root / own).parents):
            if folder != root and root not in folder.parents:
                break
            try:
                limit, used = ((folder / name).read_text().strip() for name in (limit_name, used_name))
                cached = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if limit.isdigit():
                yield int(limit) - int(used) + int(cached.get(cache_name, 0))


def own_cgroups() -> list[tuple[Path, str, tuple[str, str, str]]]:
    """Of the memory control groups of this process, of version 1 and 2: the root of all, the path of its own one below
    it, and the names of limit, usage and page cache."""
    try:
        rows = [row.split(":", 2) for row in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in rows:
        if not controllers:
            found.append((CGROUPS, path.lstrip("/"), ("memory.max", "memory.current", "inactive_file")))
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            found.append((CGROUPS / "memory", path.lstrip("/"), names))
    return found


PRESETS = {"6gb": 6, "8gb": 8, "12gb": 12, "16gb": 16, "24gb": 24, "48gb": 48, "80gb": 80}
"""Options of `hardware=` -> GB of their card."""
MARGIN = 0.94
"""A card has somewhat less memory for programs than its name says."""


def fitting_presets(memory: float) -> list[str]:
    """The options of `hardware=` for cards of at most this many GiB, the largest first."""
    return [name for name, size in reversed(PRESETS.items()) if size * MARGIN <= memory]


def found_preset() -> str | None:
    """The option of `hardware=` for this machine's GPU; None without a GPU.

    Raises UserError for a GPU that is smaller than the smallest card.
    """
    if not torch.cuda.is_available():
        return None
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    if presets := fitting_presets(memory):
        return presets[0]
    problem = f"this GPU has {memory:.1f} GiB, and the smallest preset is for {min(PRESETS.values())} GB"
    raise UserError(f"hardware=auto: {problem}; set the options by hand")


def num_gpus(accelerator: str) -> int:
    """GPUs that a run finds on this machine under `trainer.accelerator`."""
    return torch.cuda.device_count() if accelerator != "cpu" else 0


def default_precision(on_gpu: bool) -> Literal["bf16-mixed", "16-mixed", "32-true"]:
    """What `trainer.precision=auto` stands for: bf16 where the device computes it natively.

    A GPU without bf16 gets fp16 with loss scaling, a CPU without it (no AVX-512) gets fp32: torch would compute bf16
    convolutions there about 25 times slower than fp32 ones.

    on_gpu: whether the run is on a GPU; where this machine has none, a GPU with bf16 is assumed.
    """
    if on_gpu:
        here = torch.cuda.is_available()
        return "16-mixed" if here and not torch.cuda.is_bf16_supported(including_emulation=False) else "bf16-mixed"
    return "bf16-mixed" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "32-true"


def autocast_precision(precision: str) -> Precision:
    """What autocast computes in under a Lightning precision: `bf16` under `bf16-mixed`, `fp32` under `32-true`."""
    return "bf16" if precision == "bf16-mixed" else "fp16" if precision == "16-mixed" else "fp32"
