"""Which of the processes of one command this one is, and which of them says what several have found.

Knows the words of torchrun, srun and Lightning's launcher; must not know what the processes do.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from sdft.hardware import num_gpus


@dataclass(frozen=True)
class ProcessInfo:
    """Which of the processes this one is; `local_rank` counts those of one machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> ProcessInfo:
        """As torchrun, srun or Lightning say it; alone without them."""
        said = os.environ
        if "WORLD_SIZE" in said:
            # Lightning, which starts the processes of one machine, has no RANK.
            local_rank = said.get("LOCAL_RANK", "0")
            return cls(int(said.get("RANK", local_rank)), int(said["WORLD_SIZE"]), int(local_rank))
        # Only srun says how many tasks a step has; the variables of the job are also there in its batch script.
        if "SLURM_STEP_NUM_TASKS" in said and "SLURM_PROCID" in said:
            ranks = (said["SLURM_PROCID"], said["SLURM_STEP_NUM_TASKS"], said.get("SLURM_LOCALID", "0"))
            return cls(*map(int, ranks))
        return cls()

    def should_print(self, text: str) -> bool:
        """Whether this process prints what others may have found as well.

        Processes that have met print a text once, whoever finds it first. Before they meet, the first of each machine
        speaks, since all of a machine see the same files.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.local_rank == 0
        try:
            return torch.distributed.group.WORLD.get_group_store().add(f"said: {text}", 1) == 1
        except RuntimeError:
            return self.rank == 0  # the store was rank 0's and ended with it, which has said why


def num_processes(accelerator: str, devices: int | Literal["auto"], num_nodes: int) -> int:
    """Processes of a run on machines like this one: one a GPU, or one on a machine without GPUs."""
    return (num_gpus(accelerator) or 1 if devices in ("auto", -1) else int(devices)) * num_nodes
