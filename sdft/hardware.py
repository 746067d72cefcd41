"""What this machine offers: available memory, and the precision in which it computes fast."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from sdft.types import Precision


def reuse_freed_memory() -> None:
    """Let it be kept for the next block of about that size: page faults cost as much as the reading or arithmetic.

    glibc does so once a block of just under 32 MiB was freed (mallopt(3), M_MMAP_THRESHOLD); elsewhere nothing happens.
    """
    block = torch.empty(31 * 2**20, dtype=torch.uint8)
    del block


def available_memory() -> float:
    """Bytes of memory that the system can still give; infinity if unknown."""
    try:
        rows = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((int(row.split()[1]) * 2**10 for row in rows if row.startswith("MemAvailable")), float("inf"))


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
