"""How much memory there is, and how the C library treats what is freed."""

from __future__ import annotations

from pathlib import Path

import torch


def keep_freed_memory() -> None:
    """Let it be kept for the next block of about that size: page faults cost as much as the reading or arithmetic.

    glibc does so once a block of just under 32 MiB was freed (mallopt(3), M_MMAP_THRESHOLD); elsewhere nothing happens.
    """
    block = torch.empty(31 * 2**20, dtype=torch.uint8)
    del block


def available_memory() -> float:
    """Bytes that the system can give; without end where it does not say."""
    try:
        rows = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((int(row.split()[1]) * 2**10 for row in rows if row.startswith("MemAvailable")), float("inf"))
