"""The rank of this process under torchrun, srun or Lightning's launcher, and which process prints a message."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass
from typing import Literal, NoReturn

import torch

from sdft.errors import UserError
from sdft.hardware import num_gpus


@dataclass(frozen=True)
class ProcessInfo:
    """Rank among all processes of the run; `local_rank` is the rank among those of one machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> ProcessInfo:
        """From the environment variables of torchrun, srun or Lightning; rank 0 of 1 without them."""
        said = os.environ
        if "WORLD_SIZE" in said:
            # Lightning, which starts the processes of one machine, has no RANK.
            local_rank = said.get("LOCAL_RANK", "0")
            return cls(int(said.get("RANK", local_rank)), int(said["WORLD_SIZE"]), int(local_rank))
        # SLURM_STEP_NUM_TASKS is set by srun only; the job's variables are also set in its batch script.
        if "SLURM_STEP_NUM_TASKS" in said and "SLURM_PROCID" in said:
            ranks = (said["SLURM_PROCID"], said["SLURM_STEP_NUM_TASKS"], said.get("SLURM_LOCALID", "0"))
            return cls(*map(int, ranks))
        return cls()

    def should_print(self, text: str) -> bool:
        """Whether this process prints a message that other processes may want to print too.

        Once the processes are connected, the first one to call this prints. Before that, local rank 0 of each machine
        does, since all processes of a machine see the same files.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.local_rank == 0
        try:
            return torch.distributed.group.WORLD.get_group_store().add(f"said: {text}", 1) == 1
        except RuntimeError:
            return self.rank == 0  # the store ended with rank 0, which has printed the reason


def exit_with_error(error: UserError) -> NoReturn:
    """Print the message of an error once, however many processes have found it, and exit with status 2."""
    process = ProcessInfo.current()
    if process.should_print(str(error)):
        # A folder that one machine does not see is missing there only.
        where = "" if process.rank == process.local_rank else f" on {socket.gethostname()}"
        print(f"error{where}: {error}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def num_processes(accelerator: str, devices: int | Literal["auto"], num_nodes: int) -> int:
    """Processes of a run on machines like this one: one a GPU, or one on a machine without GPUs."""
    return (num_gpus(accelerator) or 1 if devices in ("auto", -1) else int(devices)) * num_nodes
