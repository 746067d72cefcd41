"""Bytes of live tensors and FLOPs of what runs inside a `with`, on real and on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary


def attention_flops(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of attention on a CPU, which torch's registry lacks."""
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def attention_backward_flops(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    """FLOPs of its backward pass."""
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


class AllocationTracker(TorchDispatchMode):
    """Tracks the bytes of live tensors that were allocated inside the `with`, and counts FLOPs.

    peak: the most bytes at any time. Parameters, buffers and gradients of the modules `known`, and `tensors`, are not
        counted.
    """

    def __init__(self, *known: nn.Module, tensors: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._seen = WeakIdKeyDictionary()
        for tensor in tensors:
            self._seen[tensor.untyped_storage()] = True
        for module in known:
            for tensor in (*module.parameters(), *module.buffers()):
                self._seen[tensor.untyped_storage()] = True
                if tensor.grad is not None:
                    self._seen[tensor.grad.untyped_storage()] = True

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if formula := FLOPS.get(function._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._track(leaf.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._seen:
            self._seen[storage] = True
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._release, storage.nbytes()).atexit = False

    def _release(self, num_bytes: int) -> None:
        self.now -= num_bytes
