"""Transformer blocks whose weights stay in the memory of the machine, and are copied to the device for each call.

With gradient checkpointing, a block's weights are on the device while it runs forward, and again while it is run a
second time in the backward pass. What is copied while another block computes costs no time if the bus is fast enough.

Not diffusers' group offloading: it exchanges the data of parameters that autograd has saved for the backward pass.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sdft.errors import UserError
from sdft.types import OffloadedBlocks


@dataclass(eq=False)
class Slot:
    """Room on the device for the frozen weights of one block.

    stamp: identifies the weights that are in it. ready: when they are, if another stream copies them.
    """

    tensors: list[Tensor]
    stamp: Any = None
    ready: Any = None


class BlockStream:
    """Copies the weights of `blocks` to the device when they are called.

    Frozen weights go to one of two slots, and those of the block that came next the last time to the other, on a CUDA
    stream of their own. Trainable weights are copied by autograd, so that their gradients arrive on the host, where the
    optimizer updates them and has their states.
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        self.places = [
            [(layer, name) for layer in block.modules() for name, p in layer._parameters.items() if p is not None]
            for block in blocks
        ]
        self._slots: dict[Any, list[Slot]] = {}
        self._called = (-1, -1)  # the last two blocks
        self._followers: dict[tuple[int, int], int] = {}
        self._copying: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"places": self.places, "_slots": {}, "_called": (-1, -1), "_followers": {}, "_copying": None}

    def weights(self, index: int | None = None) -> list[nn.Parameter]:
        """The parameters on the host, of one block or of all."""
        chosen = self.places if index is None else [self.places[index]]
        found = [layer._parameters[name] for places in chosen for layer, name in places]
        return [p for p in found if p is not None]

    @contextmanager
    def on_device(self, index: int, device: torch.device) -> Iterator[None]:
        """Inside the `with`, the weights of a block are copies on `device`."""
        places, own = self.places[index], self.weights(index)
        self._pin(own, device)
        frozen = iter(self._fetch(index, device))
        copies = [p.to(device, non_blocking=True, copy=True) if p.requires_grad else next(frozen) for p in own]
        self._followers[self._called] = index
        self._called = self._called[1], index
        if self._called in self._followers:
            self._fetch_ahead(self._followers[self._called], device)
        try:
            for (layer, name), copy in zip(places, copies, strict=True):
                layer._parameters[name] = copy  # type: ignore[assignment]
            yield
        finally:
            for (layer, name), p in zip(places, own, strict=True):
                layer._parameters[name] = p

    def allocate(self, device: torch.device) -> list[Tensor]:
        """Make the slots of all blocks, which are otherwise made when they are needed."""
        for index in range(len(self.places)):
            self._pair(self._frozen(index), device)
        return [tensor for pair in self._slots.values() for slot in pair for tensor in slot.tensors]

    def _frozen(self, index: int) -> list[nn.Parameter]:
        return [p for p in self.weights(index) if not p.requires_grad]

    def _pair(self, frozen: Sequence[Tensor], device: torch.device) -> list[Slot]:
        """The two slots for such weights, the one that was used longer ago first."""
        kind = (device, *((p.shape, p.dtype) for p in frozen))
        if kind not in self._slots:
            self._slots[kind] = [Slot([torch.empty_like(p, device=device) for p in frozen]) for _ in range(2)]
        return self._slots[kind]

    def _fetch(self, index: int, device: torch.device) -> Sequence[Tensor]:
        """The frozen weights of a block on the device."""
        if not (frozen := self._frozen(index)):
            return ()
        pair, stamp = self._pair(frozen, device), stamp_of(frozen)
        slot = next((slot for slot in pair if slot.stamp == stamp), pair[0])
        if slot.ready is not None:
            torch.cuda.current_stream(device).wait_event(slot.ready)
            slot.ready = None
        if slot.stamp != stamp:
            self._fill(slot, frozen, stamp)
        pair.remove(slot)
        pair.append(slot)
        return slot.tensors

    def _fetch_ahead(self, index: int, device: torch.device) -> None:
        """Begin to copy the frozen weights of a block, after what the device has been told to do so far."""
        if not (frozen := self._frozen(index)):
            return
        pair, stamp = self._pair(frozen, device), stamp_of(frozen)
        if any(slot.stamp == stamp for slot in pair):
            return
        with self._copy_stream(device) as stream:
            self._fill(pair[0], frozen, stamp)
            pair[0].ready = None if stream is None else stream.record_event()

    @contextmanager
    def _copy_stream(self, device: torch.device) -> Iterator[Any]:
        """The stream of copies, which has waited for the computations that were begun; None without CUDA."""
        if not on_gpu(device):
            yield None
            return
        self._copying = self._copying or torch.cuda.Stream(device)
        self._copying.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._copying):
            yield self._copying

    @staticmethod
    def _fill(slot: Slot, frozen: Sequence[Tensor], stamp: Any) -> None:
        with torch.no_grad():
            torch._foreach_copy_(slot.tensors, list(frozen), non_blocking=True)
        slot.stamp = stamp

    @staticmethod
    def _pin(own: Sequence[nn.Parameter], device: torch.device) -> None:
        """Lock weights in memory, from where a GPU copies while it computes."""
        for p in own if on_gpu(device) else ():
            if not p.is_pinned():
                p.data = p.data.pin_memory()


def stream_blocks(network: nn.Module, count: OffloadedBlocks) -> None:
    """Keep the weights that `count` of the network's transformer blocks have now on the host; evenly chosen.

    Whatever is added to the blocks afterwards, such as adapters, moves with the network. Training needs gradient
    checkpointing: autograd would save the weights of all blocks on the device.

    Raises UserError where the network has fewer blocks.
    """
    blocks = [block for block in network.modules() if isinstance(block, BasicTransformerBlock)]
    number = len(blocks) if count == "all" else count
    if number > len(blocks):
        raise UserError(f"model.offload_blocks={number}: there are {len(blocks)} transformer blocks; 'all' means all")
    chosen = [block for i, block in enumerate(blocks) if i * number // len(blocks) < (i + 1) * number // len(blocks)]
    stream = BlockStream(chosen)
    for index, block in enumerate(chosen):
        block.stream, block.stream_index = stream, index  # type: ignore[assignment]
        # Bound methods, so that a copy of the network has its own.
        block.forward = types.MethodType(_forward, block)  # type: ignore[method-assign]
        block._apply = types.MethodType(_apply, block)  # type: ignore[method-assign]


def streams(model: nn.Module) -> list[BlockStream]:
    """The streams of a model's blocks."""
    found = (module.__dict__.get("stream") for module in model.modules())
    return list(dict.fromkeys(stream for stream in found if isinstance(stream, BlockStream)))


def on_host(model: nn.Module) -> set[nn.Parameter]:
    """The weights that stay on the host."""
    return {p for stream in streams(model) for p in stream.weights()}


def on_gpu(device: torch.device) -> bool:
    """Whether this is a CUDA device that exists; forecasts have others."""
    return device.type == "cuda" and torch.cuda.is_available()


def stamp_of(weights: Sequence[Tensor]) -> Any:
    """Equal for the same tensors with the same values."""
    return tuple((p.untyped_storage()._cdata, p.storage_offset(), p._version) for p in weights)


def _forward(block: Any, *args: Any, **kwargs: Any) -> Any:
    """`block.forward` on the device of its inputs."""
    device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    with block.stream.on_device(block.stream_index, device):
        return type(block).forward(block, *args, **kwargs)


def _apply(block: Any, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`block._apply`, which leaves weights on the host where they would go to another device."""
    hosted = {id(p) for p in block.stream.weights(block.stream_index)}

    def stay(t: Tensor) -> Tensor:
        target = change(t.new_empty(0)) if id(t) in hosted else None
        if target is None or target.device == t.device or t.is_meta:
            return change(t)
        return t.to(target.dtype)

    return type(block)._apply(block, stay, recurse)
