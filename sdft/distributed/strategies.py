"""How one model learns on several devices: a copy on each (`ddp`), or one copy divided among them (`fsdp`).

Knows processes and who holds which share of a weight; must not know what is trained. What a checkpoint is read as does
not tell which strategy wrote it, so that each resumes from any other's, whatever the number of processes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sdft.distributed.processes import num_processes
from sdft.distributed.saving import BackgroundSave
from sdft.distributed.sharding import shard_like, snapshot, whole
from sdft.errors import UserError
from sdft.tuning.parameters import copy_parameters, trainable_parameters
from sdft.types import Count

ONE_KERNEL, PLAIN = {"foreach": False, "fused": True}, {"foreach": True, "fused": None}
"""How AdamW makes its step: for sharded weights in one operation, as each one costs milliseconds of bookkeeping."""
UNITS = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")
"""Classes of the repeated blocks: the weights of one of them at a time are put together for its computation."""


def auto(
    accelerator: Literal["auto", "cpu", "gpu"], devices: int | Literal["auto"], num_nodes: Count
) -> Strategy | Literal["auto"]:
    """One device, or `ddp` where there are several."""
    return ddp() if num_processes(accelerator, devices, num_nodes) > 1 else "auto"


def ddp() -> Strategy:
    """A copy of the model on each device; the gradients of what learns are averaged."""
    return TrainableDDP(gradient_as_bucket_view=True)


def fsdp(shard_ranks: Count | None = None) -> Strategy:
    """One copy of what the step needs, divided among the devices (FSDP2): weights, gradients, optimiser and average.

    shard_ranks: devices among which one copy is divided; all of them where not said. As many as a node has keeps the
        gathering of weights inside the nodes, and only gradients travel between them (hybrid sharding).
    """
    return FSDP2(shard_ranks)


class CollectiveSave(Strategy):
    """A save that fails on rank 0 fails everywhere: no rank waits for one that has left."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        problem = None
        try:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, filepath)
        except UserError as error:
            problem = error
        told = self.broadcast(str(problem) if problem else None)
        if told is not None:
            raise problem or UserError(told)


class TrainableDDP(CollectiveSave, DDPStrategy):
    """DDP that sends only what learns: frozen weights are the same everywhere, read from the same files."""

    def configure_ddp(self) -> None:
        module = self.lightning_module
        learn = {f"model.{name}" for name, _ in trainable_parameters(module.model)}
        named = (*module.named_parameters(), *module.named_buffers())
        frozen = [name for name, _ in named if name not in learn]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
        super().configure_ddp()


class FSDP2(ModelParallelStrategy):
    """FSDP2, with checkpoints that everyone reads, written while training goes on.

    Lightning's own are of two kinds that only it resumes, and on as many processes as saved them.
    """

    mesh: DeviceMesh

    def __init__(self, shard_ranks: int | None):
        super().__init__()
        self.shard_ranks = shard_ranks
        self._saving: BackgroundSave | None = None

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def divide(self, parts: Iterable[nn.Module]) -> None:
        """Divide the weights of `parts`, the repeated blocks of each by themselves."""
        mixed = self.precision_plugin.precision == "bf16-mixed"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if mixed else None,
            reduce_dtype=torch.float32,
            # Autocast sees to it; a cast here would also round the sizes that the UNet is told.
            cast_forward_inputs=False,
        )
        self.mesh = self.shard_mesh()
        for part in parts:
            for block in [*(m for m in part.modules() if type(m).__name__ in UNITS), part]:
                # Also of the part itself: what stays together after a validation would hide the shards from EMA.
                fully_shard(block, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)

    def shard_mesh(self) -> DeviceMesh:
        """Copies x shards, or only shards where there is one copy."""
        size = self.shard_ranks or self.world_size
        if self.world_size % size:
            raise UserError(
                f"trainer.strategy.shard_ranks={size}: {self.world_size} devices do not divide into groups of it; "
                "set it to the number of devices of a node"
            )
        kind = self.root_device.type
        if size == self.world_size:
            return init_device_mesh(kind, (size,), mesh_dim_names=("shards",))
        return init_device_mesh(kind, (self.world_size // size, size), mesh_dim_names=("copies", "shards"))

    def gathered(self, module: Any, rebuild: Callable[[], Any]) -> Any:
        """On rank 0, a module with the learned weights that needs no other process; all ranks must ask."""
        weights = whole(dict(trainable_parameters(module.model)))
        if not self.is_global_zero:
            return module
        module = rebuild()
        copy_parameters(module.model, weights)
        return module

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group.update(ONE_KERNEL)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Copy what is to be saved, and let a thread write it; of several copies of the model, the first is written."""
        self.wait()
        path, token = self.broadcast((str(filepath), secrets.token_hex(4)))
        number, count = self.mesh.get_local_rank(-1), self.mesh.size(-1)
        # The token: a file that a killed run left is never taken for one of this save.
        files = [f"step_{checkpoint['global_step']:06d}.{token}.rank_{n}_of_{count}" for n in range(count)]
        own = files[number] if self.mesh.ndim == 1 or self.mesh.get_local_rank(0) == 0 else None
        outline, slices = snapshot(checkpoint)
        self._saving = BackgroundSave(Path(path), files, own, slices, outline if self.is_global_zero else None)
        # Lightning queues the job again as soon as it has made a save of this name.
        if Path(path).name.startswith("hpc_ckpt_"):
            self.wait()

    def wait(self) -> None:
        """Until the last save is on the disk, whole. All ranks must ask, and all raise what went wrong on one."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        if problem := self._of_any(saving.own_error()):
            saving.abort()
        else:
            problem = self._of_any(saving.problem())
        if problem:
            raise problem

    def _of_any(self, problem: BaseException | None) -> BaseException | None:
        """A problem of this rank, or of the first that has one."""
        told: list[str | None] = [None] * self.world_size
        dist.all_gather_object(told, problem and (str(problem) or repr(problem)))
        first = next(filter(None, told), None)
        return problem or (UserError(first) if first else None)

    def after_save(self, action: Callable[[], None]) -> None:
        """Do something in rank 0 when the last save is whole."""
        if self._saving:
            self._saving.then(action)
        elif self.is_global_zero:
            action()

    def on_train_end(self) -> None:
        self.wait()

    def teardown(self) -> None:
        if self._saving:  # as after an error
            self._saving.finish_without_others()
            self._saving = None
        super().teardown()

    def remove_checkpoint(self, filepath: Any) -> None:
        self.after_save(partial(self.checkpoint_io.remove_checkpoint, filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self.wait()
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {f"model.{name}": p.detach() for name, p in trainable_parameters(self.lightning_module.model)}

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        for name, parameter in trainable_parameters(self.lightning_module.model):
            parameter.copy_(shard_like(parameter, checkpoint["state_dict"][f"model.{name}"]))

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state = optimizer.state_dict()
        return state | {"param_groups": [group | PLAIN for group in state["param_groups"]]}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {
                    name: shard_like(parameters[number], value) if value.shape == parameters[number].shape else value
                    for name, value in kept.items()
                }
                for number, kept in saved["state"].items()
            }
            groups = [group | ONE_KERNEL for group in saved["param_groups"]]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
