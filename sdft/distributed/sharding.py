"""Sharded weights: the local shard of a process, and gathering the whole.

A sharded weight is a DTensor split along its first axis into equal shards, the last ones perhaps shorter or empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

Name = TypeVar("Name")
MESSAGE_BYTES = 2**28
"""Largest message of one rank when weights are gathered."""


def shard_like(parameter: Tensor, weight: Tensor) -> Tensor:
    """A whole weight sharded like the parameter: each rank cuts its shard out of its copy, without communication."""
    if not isinstance(parameter, DTensor) or isinstance(weight, DTensor):
        return weight
    weight = weight.to(parameter.device, parameter.dtype)
    return distribute_tensor(weight, parameter.device_mesh, parameter.placements, src_data_rank=None)


def local_shard(weight: Tensor) -> Tensor:
    """The shard of this rank (a view, detached); the weight itself if it is not sharded."""
    with torch.no_grad():
        return weight.to_local() if isinstance(weight, DTensor) else weight


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """The total L2 norm of tensors, all of them whole or all sharded."""
    own = torch.nn.utils.get_total_norm([local_shard(tensor) for tensor in tensors])
    mesh = next((tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)), None)
    if mesh is None:
        return own
    # torch's own function for DTensors sends one message per tensor.
    squared = own.square()
    dist.all_reduce(squared, group=mesh.get_group(-1))
    return squared.sqrt()


def clip_gradients(parameters: Iterable[Tensor], largest: float) -> None:
    """Scale the gradients, which may be on several devices, down to a total L2 norm of at most `largest`."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    factor = (largest / (norm(gradients) + 1e-6)).clamp(max=1.0)
    for device in {gradient.device for gradient in gradients}:
        shards = [local_shard(gradient) for gradient in gradients if gradient.device == device]
        torch._foreach_mul_(shards, factor.to(device))


def snapshot(state: Any) -> tuple[Any, list[Tensor]]:
    """A copy of a nested state in CPU memory, with meta tensors in place of sharded ones, and this rank's shards of
    these, in the same order."""
    slices: list[Tensor] = []

    def copied(value: Any) -> Any:
        if isinstance(value, DTensor):
            slices.append(local_shard(value).to("cpu", copy=True))
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        if isinstance(value, Tensor):
            return value.detach().to("cpu", copy=True)
        if isinstance(value, Mapping):
            return {name: copied(one) for name, one in value.items()}
        return type(value)(copied(one) for one in value) if isinstance(value, list | tuple) else value

    return copied(state), slices


def gather_weights(weights: Mapping[Name, Tensor]) -> dict[Name, Tensor]:
    """The same weights, sharded ones gathered in the CPU memory of rank 0; on other ranks these are empty.

    Collective: all ranks must call it.
    """
    found = dict(weights)
    sharded = {name: weight for name, weight in weights.items() if isinstance(weight, DTensor)}
    for message in _messages(sharded):
        size = next(iter(message.values())).device_mesh.size(-1)
        slices = [_padded(weight, size) for weight in message.values()]
        sent = torch.cat(slices)
        received = [torch.empty_like(sent) for _ in range(size)]
        dist.all_gather(received, sent, next(iter(message.values())).device_mesh.get_group(-1))
        columns = torch.stack(received).split([one.numel() for one in slices], dim=1)
        for (name, weight), column in zip(message.items(), columns, strict=True):
            first = dist.get_rank() == 0
            found[name] = column.reshape(-1)[: weight.numel()].view(weight.shape).cpu() if first else torch.empty(0)
    return found


def _messages(weights: Mapping[Name, DTensor]) -> Iterator[dict[Name, DTensor]]:
    """Weights of one dtype, grouped up to a size."""
    message: dict[Name, DTensor] = {}
    num_bytes = 0
    for name, weight in weights.items():
        other = message and next(iter(message.values())).dtype != weight.dtype
        if other or num_bytes > MESSAGE_BYTES:
            yield message
            message, num_bytes = {}, 0
        message[name] = weight
        num_bytes += local_shard(weight).nbytes
    if message:
        yield message


def _padded(weight: DTensor, size: int) -> Tensor:
    """This rank's shard, flat and padded to the longest: concatenated, the shards begin with the whole weight."""
    share, rows = local_shard(weight).reshape(-1), -(-weight.shape[0] // size)
    return F.pad(share, (0, rows * weight.numel() // max(weight.shape[0], 1) - share.numel()))
