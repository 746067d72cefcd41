"""Traces one block of each kind, and lets the others of its kind take as much memory and as many FLOPs.

SDXL has 70 transformer blocks of two kinds, which are nine tenths of the operations of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from sdft.planning.allocations import AllocationTracker


class Like(NamedTuple):
    """Shape and dtype of a tensor."""

    shape: torch.Size
    dtype: torch.dtype


class Costs(NamedTuple):
    """Memory of one call of a block in bytes, relative to what was held before it, and its FLOPs.

    outputs: what the block returns, flat, with `Like` for tensors. forward_peak, unsaved_peak: without `cast`, and
    where autograd saves what it needs or a checkpoint drops it. kept: what autograd saves, without the inputs.
    cast: weights that autocast has cast and keeps until its end.
    """

    outputs: list[Any]
    structure: TreeSpec
    forward_peak: int
    unsaved_peak: int
    kept: int
    cast: int
    forward_flops: int
    backward_peak: int
    backward_flops: int


def repeated_blocks(model: nn.Module) -> set[nn.Module]:
    """Blocks of the classes that diffusers and transformers never split, without those that hold others."""
    found = set[nn.Module]()
    for owner in model.modules():
        names = getattr(owner, "_no_split_modules", None) or ()
        found |= {block for block in owner.modules() if type(block).__name__ in names}
    return {block for block in found if not any(part in found for part in block.modules() if part is not block)}


class RepeatedBlocks:
    """Within the `with`, blocks of `model` whose calls are alike are traced by `ledger` once, in FakeTensorMode.

    Calls are alike where the shapes and dtypes of inputs and parameters are, and what of them needs a gradient.
    """

    def __init__(self, model: nn.Module, ledger: AllocationTracker):
        self.ledger = ledger
        self._forwards = {block: block.forward for block in repeated_blocks(model)}
        self._costs: dict[Hashable, Costs] = {}
        self._casts: dict[nn.Module, Tensor] = {}

    def __enter__(self) -> RepeatedBlocks:
        for block, forward in self._forwards.items():
            block.forward = self._stand_in(block, forward)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        for block, forward in self._forwards.items():
            block.forward = forward  # type: ignore[method-assign]

    def end_autocast(self) -> None:
        """Release what autocast has cast, as the end of its `with` does."""
        self._casts.clear()

    def _stand_in(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """What is called instead of `block.forward`."""
        tensors = {**dict(block.named_parameters()), **dict(block.named_buffers())}
        signature = type(block), tuple((name, *alike(tensor)) for name, tensor in tensors.items())
        trained = next((p for p in block.parameters() if p.requires_grad), None)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            leaves, structure = tree_flatten((args, kwargs))
            key = (
                signature,
                structure,
                tuple(alike(leaf) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves),
                torch.is_grad_enabled(),
                torch.is_autocast_enabled("cpu"),
            )
            in_backward = torch._C._current_graph_task_id() != -1  # a checkpoint's second forward pass
            in_checkpoint = not in_backward and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
            if key not in self._costs:
                self._costs[key] = self._measure(forward, leaves, structure)
                self._casts[block] = torch.empty(0)  # autocast itself holds them
            costs = self._costs[key]
            if not in_backward and block not in self._casts:
                self._casts[block] = torch.empty(costs.cast, dtype=torch.uint8)
            inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            if trained is not None:
                inputs.append(trained)  # so that the output needs a gradient where the block is the first that learns
            cast = costs.cast if in_backward else 0
            peak, kept = (costs.unsaved_peak, 0) if in_checkpoint else (costs.forward_peak, costs.kept)
            outputs = list(StandIn.apply(costs, self.ledger, cast + peak, cast + kept, *inputs))
            found = [outputs.pop(0) if isinstance(leaf, Like) else leaf for leaf in costs.outputs]
            return tree_unflatten(found, costs.structure)

        return stand_in

    def _measure(self, forward: Callable[..., Any], leaves: list[Any], structure: TreeSpec) -> Costs:
        """Trace one call, and its backward pass if it has one. The ledger's peak and FLOPs stay as they were."""
        ledger = self.ledger
        peak, flops, start = ledger.peak, ledger.flops, ledger.now
        copies = [
            leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        args, kwargs = tree_unflatten(copies, structure)
        ledger.peak = ledger.now
        # Inside a checkpoint, its own hooks would drop what autograd saves.
        with saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            outputs, output_structure = tree_flatten(forward(*args, **kwargs))
        forward_peak, forward_flops = ledger.peak - start, ledger.flops - flops
        made = [leaf for leaf in outputs if isinstance(leaf, Tensor)]
        kept = ledger.now - start - sum(tensor.nbytes for tensor in made)
        like = [Like(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in outputs]
        del outputs
        backward_peak = backward_flops = 0
        learning = [tensor for tensor in made if tensor.requires_grad]
        if learning:
            gradients = [torch.empty_like(tensor) for tensor in learning]
            ledger.peak = before = ledger.now
            torch.autograd.backward(learning, gradients)
            backward_peak, backward_flops = ledger.peak - before, ledger.flops - flops - forward_flops
            del gradients
        del made, learning
        for copy in copies:
            if isinstance(copy, Tensor):
                copy.grad = None
        cast = ledger.now - start
        unsaved_peak = forward_peak - cast
        if backward_peak:  # otherwise autograd saved nothing
            ledger.peak = ledger.now
            with saved_tensors_hooks(lambda saved: None, lambda saved: saved):
                forward(*args, **kwargs)
            unsaved_peak = ledger.peak - start - cast
        ledger.peak, ledger.flops = peak, flops
        return Costs(
            outputs=like,
            structure=output_structure,
            forward_peak=max(forward_peak - cast, 0),
            unsaved_peak=max(unsaved_peak, 0),
            kept=max(kept - cast, 0),  # less than none where a block returns its input
            cast=cast,
            forward_flops=forward_flops,
            backward_peak=backward_peak,
            backward_flops=backward_flops,
        )


class StandIn(torch.autograd.Function):
    """Allocates what a block allocates in its forward and backward pass."""

    @staticmethod
    def forward(
        ctx: Any, costs: Costs, ledger: AllocationTracker, peak: int, kept: int, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        torch.empty(peak, dtype=torch.uint8)
        ledger.flops += costs.forward_flops
        saved = torch.empty(kept, dtype=torch.uint8)[:0]  # checkpoints want the same shape again
        ctx.costs, ctx.ledger = costs, ledger
        ctx.save_for_backward(saved, *inputs)
        return tuple(torch.empty(like.shape, dtype=like.dtype) for like in costs.outputs if isinstance(like, Like))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _, *inputs = ctx.saved_tensors  # inside a checkpoint, this is what makes it run the block again
        torch.empty(ctx.costs.backward_peak, dtype=torch.uint8)
        ctx.ledger.flops += ctx.costs.backward_flops
        return (
            None,
            None,
            None,
            None,
            *(torch.empty_like(t) if t.requires_grad and not t.is_leaf else None for t in inputs),
        )


def alike(tensor: Tensor) -> tuple[Any, ...]:
    """What of a tensor decides about memory and time."""
    return tuple(tensor.shape), tensor.dtype, tensor.requires_grad
