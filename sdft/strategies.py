"""How one model learns on several devices: a copy on each (`ddp`), or one copy divided among them (`fsdp`).

Knows processes and who holds which share of a weight; must not know what is trained. Every strategy writes the same
checkpoint, a single file of whole tensors, so that each resumes from any other's, whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sdft.shards import divided_like, whole
from sdft.tuning import learning, put
from sdft.types import Count, UserError

ONE_KERNEL, PLAIN = {"foreach": False, "fused": True}, {"foreach": True, "fused": None}
"""How AdamW makes its step: for sharded weights in one operation, as each one costs milliseconds of bookkeeping."""
UNITS = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")
"""Classes of the repeated blocks: the weights of one of them at a time are put together for its computation."""


def auto(
    accelerator: Literal["auto", "cpu", "gpu"], devices: int | Literal["auto"], num_nodes: Count
) -> Strategy | Literal["auto"]:
    """One device, or `ddp` where there are several."""
    found = torch.cuda.device_count() if accelerator != "cpu" else 0
    num_devices = (found or 1) if devices == "auto" or devices == -1 else devices
    return ddp() if num_devices * num_nodes > 1 else "auto"


def ddp() -> Strategy:
    """A copy of the model on each device; the gradients of what learns are averaged."""
    return Copies(gradient_as_bucket_view=True)


def fsdp(shard_ranks: Count | None = None) -> Strategy:
    """One copy of what the step needs, divided among the devices (FSDP2): weights, gradients, optimiser and average.

    shard_ranks: devices among which one copy is divided; all of them where not said. As many as a node has keeps the
        gathering of weights inside the nodes, and only gradients travel between them (hybrid sharding).
    """
    return Shards(shard_ranks)


class SaveTogether(Strategy):
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


class Copies(SaveTogether, DDPStrategy):
    """DDP that sends only what learns: frozen weights are the same everywhere, read from the same files."""

    def configure_ddp(self) -> None:
        module = self.lightning_module
        learn = {f"model.{name}" for name, _ in learning(module.model)}
        named = (*module.named_parameters(), *module.named_buffers())
        frozen = [name for name, _ in named if name not in learn]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
        super().configure_ddp()


class Shards(SaveTogether, ModelParallelStrategy):
    """FSDP2, with checkpoints like everyone's.

    Lightning's own are of two kinds that only it resumes, and on as many processes as saved them.
    """

    def __init__(self, shard_ranks: int | None):
        super().__init__()
        self.shard_ranks = shard_ranks

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
        mesh = self.shard_mesh()
        for part in parts:
            for block in [*(m for m in part.modules() if type(m).__name__ in UNITS), part]:
                # Also of the part itself: what stays together after a validation would hide the shards from EMA.
                fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)

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
        weights = whole(dict(learning(module.model)))
        if not self.is_global_zero:
            return module
        module = rebuild()
        put(module.model, weights)
        return module

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group.update(ONE_KERNEL)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return whole({f"model.{name}": p.detach() for name, p in learning(self.lightning_module.model)})

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        weights = checkpoint["state_dict"]
        put(self.lightning_module.model, {name.removeprefix("model."): value for name, value in weights.items()})

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        state = optimizer.state_dict()
        kept = {(number, name): value for number, values in state["state"].items() for name, value in values.items()}
        together: dict[int, dict[str, Tensor]] = {number: {} for number in state["state"]}
        for (number, name), value in whole(kept).items():
            together[number][name] = value
        return {"state": together, "param_groups": [group | PLAIN for group in state["param_groups"]]}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {
                    name: divided_like(parameters[number], value) if value.shape == parameters[number].shape else value
                    for name, value in kept.items()
                }
                for number, kept in saved["state"].items()
            }
            groups = [group | ONE_KERNEL for group in saved["param_groups"]]
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path)
