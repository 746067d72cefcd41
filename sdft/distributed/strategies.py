"""Strategies for several devices: a copy of the model on each (`ddp`), or one copy sharded among them (`fsdp`).

Checkpoints do not depend on the strategy that wrote them: each resumes from any other's, on any number of processes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from annotated_types import Ge
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sdft.distributed.processes import num_processes
from sdft.distributed.saving import BackgroundSave
from sdft.distributed.sharding import gather_weights, shard_like, snapshot
from sdft.errors import UserError
from sdft.protocols import StrategyHooks
from sdft.tuning.parameters import buffers_beside, copy_parameters, learned_state, trainable_parameters
from sdft.types import Count

ONE_KERNEL, PLAIN = {"foreach": False, "fused": True}, {"foreach": True, "fused": None}
"""How an optimizer steps: fused for sharded weights, where each DTensor operation costs milliseconds of bookkeeping."""
UNITS = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")
"""Classes of the repeated blocks, which are FSDP units: the weights of one at a time are gathered."""


def auto(
    accelerator: Literal["auto", "cpu", "gpu"], devices: int | Literal["auto"], num_nodes: Count
) -> Strategy | Literal["auto"]:
    """Lightning's default for one device, `ddp` for several."""
    return ddp() if num_processes(accelerator, devices, num_nodes) > 1 else "auto"


def ddp() -> Strategy:
    """A copy of the model on each device; gradients are averaged."""
    return TrainableDDP(gradient_as_bucket_view=True)


def fsdp(shard_ranks: Annotated[int, Ge(2)] | None = None) -> Strategy:
    """FSDP2: weights, gradients, optimizer states and average are sharded among the devices; nothing is on one device.

    shard_ranks: devices that share one copy, at least 2; all if None. As many as a node has keeps the gathering of
        weights inside the nodes, so that only gradients travel between them (hybrid sharding).
    """
    return FSDP2(shard_ranks)


class CollectiveSave(Strategy):
    """Raises the error of a failed save on all ranks, so that none waits for one that has left."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        problem = None
        try:
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, filepath)
        except UserError as error:
            problem = error
        message = self.broadcast(str(problem) if problem else None)
        if message is not None:
            raise problem or UserError(message)


class TrainableDDP(CollectiveSave, DDPStrategy):
    """DDP that communicates only trainable parameters: frozen weights are read from the same files everywhere."""

    def configure_ddp(self) -> None:
        module = self.lightning_module
        trained = {f"model.{name}" for name, _ in trainable_parameters(module.model)}
        named = (*module.named_parameters(), *module.named_buffers())
        frozen = [name for name, _ in named if name not in trained]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
        super().configure_ddp()


class FSDP2(StrategyHooks, ModelParallelStrategy):
    """FSDP2, with checkpoints in the project's own format, written in the background.

    Lightning's own sharded checkpoints resume only under FSDP, and on as many processes as saved them.
    """

    mesh: DeviceMesh | None = None
    """of the processes; None where there is one, and nothing is sharded"""

    def __init__(self, shard_ranks: int | None):
        super().__init__()
        self.shard_ranks = shard_ranks
        self._saving: BackgroundSave | None = None

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def num_shards(self, world_size: int) -> int:
        return 1 if world_size == 1 else self.shard_ranks or world_size

    def shard(self, modules: Iterable[nn.Module]) -> None:
        """Shard the weights of `modules`, each repeated block in them as a separate unit."""
        mixed = self.precision_plugin.precision == "bf16-mixed"
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if mixed else None,
            reduce_dtype=torch.float32,
            # Autocast casts them; a cast here would also round the sizes that condition the UNet.
            cast_forward_inputs=False,
        )
        self.mesh = self.shard_mesh()
        for module in modules:
            for block in [*(m for m in module.modules() if type(m).__name__ in UNITS), module]:
                # Also the module itself: weights left gathered after validation would hide the shards from EMA.
                fully_shard(block, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)

    def shard_mesh(self) -> DeviceMesh:
        """Copies x shards, or shards only if there is one copy."""
        size = self.num_shards(self.world_size)
        if self.world_size % size:
            raise UserError(
                f"trainer.strategy.shard_ranks={size}: {self.world_size} devices cannot be split into groups of "
                "that size; set it to the number of devices of a node"
            )
        kind = self.root_device.type
        if size == self.world_size:
            return init_device_mesh(kind, (size,), mesh_dim_names=("shards",))
        return init_device_mesh(kind, (self.world_size // size, size), mesh_dim_names=("copies", "shards"))

    def gather(self, module: Any, rebuild: Callable[[], Any]) -> Any:
        weights = gather_weights(dict(trainable_parameters(module.model)))
        if not self.is_global_zero:
            return module
        module = rebuild()
        copy_parameters(module.model, weights)
        return module

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group.update(known(ONE_KERNEL, group))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Snapshot the state and write it in a thread; of several copies of the model, the first one is written."""
        self.wait_for_saves()
        path, token = self.broadcast((str(filepath), secrets.token_hex(4)))
        number, count, copy = (0, 1, 0) if self.mesh is None else place_in(self.mesh)
        # The token: a file left by a killed run is never mistaken for one of this save.
        files = [f"step_{checkpoint['global_step']:06d}.{token}.rank_{n}_of_{count}" for n in range(count)]
        own = files[number] if copy == 0 else None
        outline, slices = snapshot(checkpoint)
        self._saving = BackgroundSave(Path(path), files, own, slices, outline if self.is_global_zero else None)
        # Lightning requeues the job as soon as a save of this name returns.
        if Path(path).name.startswith("hpc_ckpt_"):
            self.wait_for_saves()

    def wait_for_saves(self) -> None:
        """Block until the last checkpoint is complete; all ranks raise the error of one."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        if error := self._of_any(saving.own_error()):
            saving.abort()
        else:
            error = self._of_any(saving.error())
        if error:
            raise error

    def _of_any(self, error: BaseException | None) -> BaseException | None:
        """The error of this rank, or of the first rank that has one."""
        messages: list[str | None] = [None] * self.world_size
        dist.all_gather_object(messages, error and (str(error) or repr(error)))
        first = next(filter(None, messages), None)
        return error or (UserError(first) if first else None)

    def after_save(self, action: Callable[[], None]) -> None:
        if self._saving:
            self._saving.then(action)
        elif self.is_global_zero:
            action()

    def on_train_end(self) -> None:
        self.wait_for_saves()

    def teardown(self) -> None:
        if self._saving:  # as after an error
            self._saving.finish_alone()
            self._saving = None
        super().teardown()

    def remove_checkpoint(self, filepath: Any) -> None:
        self.after_save(partial(self.checkpoint_io.remove_checkpoint, filepath))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        self.wait_for_saves()
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {f"model.{name}": value for name, value in learned_state(self.lightning_module.model).items()}

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        for name, parameter in trainable_parameters(self.lightning_module.model):
            parameter.copy_(shard_like(parameter, checkpoint["state_dict"][f"model.{name}"]))
        for name, buffer in buffers_beside(self.lightning_module.model):
            buffer.copy_(checkpoint["state_dict"][f"model.{name}"])

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state = optimizer.state_dict()
        return state | {"param_groups": [group | known(PLAIN, group) for group in state["param_groups"]]}

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
            groups = [group | known(ONE_KERNEL, group) for group in saved["param_groups"]]
            optimizer.load_state_dict({"state": state, "param_groups": groups})


def place_in(mesh: DeviceMesh) -> tuple[int, int, int]:
    """(shard of this process, number of shards, copy of the model that it belongs to)."""
    return mesh.get_local_rank(-1), mesh.size(-1), mesh.get_local_rank(0) if mesh.ndim > 1 else 0


def known(options: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that the optimizer of a parameter group has."""
    return {name: value for name, value in options.items() if name in group}
