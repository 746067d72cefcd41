"""The value of a recipe for one weight, piece by piece, so that memory does not grow with the model.

Knows graphs, pieces and statistics; must not know what is written where.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial

import torch
from torch import Tensor

from sdft import rng
from sdft.errors import UserError
from sdft.formats.lora_layer import DORA
from sdft.merging.annotations import Kind
from sdft.merging.blocks import block_of, is_by_block, number_for_block
from sdft.merging.input_files import ReadWeight
from sdft.merging.recipe import Recipe
from sdft.merging.sources import Adapter, TensorSource, dora_delta, lora_delta

CHUNK_SIZE = 2**18
"""Numbers in a piece of a weight: few enough that what is made of them stays in a core's cache. Random draws are made
piece by piece, so results depend on it."""


def nonfinite_message(recipe: Recipe, readers: Mapping[str, ReadWeight], weight: str) -> str:
    """In words, the inputs that hold NaN or infinity where they say something of a weight."""
    damaged = []
    for name, source in recipe.sources.items():
        if isinstance(source, Adapter):
            layer = source.layer_of(weight)
            held = list(layer.tensors.values()) if layer else []
        else:
            held = [readers[name](weight)] if weight in source.checkpoint.weights else []
        if not all(tensor.isfinite().all() for tensor in held):
            damaged.append(source.where)
    said = f"{' and '.join(damaged)} is damaged, it holds" if damaged else "no input is damaged, but the numbers give"
    return f"{weight}: {said} NaN or infinity there; nothing is written"


class MergedWeight:
    """One weight of a recipe's result.

    weight: `part/name`. shape: of it. readers: of `OpenInputs`. every: 1, or only one row in so many.
    """

    def __init__(
        self, recipe: Recipe, readers: Mapping[str, ReadWeight], weight: str, shape: tuple[int, ...], every: int = 1
    ):
        self.recipe, self.readers, self.weight, self.shape, self.every = recipe, readers, weight, shape, every
        self.block = block_of(weight)
        self._read: dict[str, Tensor] = {}
        self._changes: dict[str, Tensor] = {}
        self._statistics: dict[str, dict[str, object]] = {}
        self._now: dict[tuple[str, int], Tensor] = {}
        """The values of one piece: several steps may use one of them."""

    def chunks(self) -> Iterator[Tensor]:
        """The result from its first row to its last, in the dtype of the arithmetic."""
        for index in range(len(self.spans)):
            yield self.value(self.recipe.result, index)

    @cached_property
    def spans(self) -> list[slice]:
        """The rows of each piece."""
        rows = self.shape[0] if self.shape else 1
        step = self.every * max(1, CHUNK_SIZE // max(1, torch.Size(self.shape[1:]).numel()))
        return [slice(start, min(start + step, rows), self.every) for start in range(0, rows, step)]

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the arithmetic: fp32, or fp64 where a model has that."""
        found = {model.checkpoint.weights[self.weight].dtype for model in self.recipe.models}
        return torch.float64 if "F64" in found else torch.float32

    def value(self, name: str, index: int, base: str | None = None) -> Tensor:
        """Piece `index` of a step or a source; `base` is the input that a DoRA changes."""
        source = self.recipe.sources.get(name)
        if isinstance(source, Adapter):
            return self._change(name, source, index, base)
        if (name, index) not in self._now:
            value = self._step(name, index) if source is None else self._held(name, source, index)
            if any(i != index for _, i in self._now):
                self._now = {}
            self._now[name, index] = value
        return self._now[name, index]

    def _held(self, name: str, source: TensorSource, index: int) -> Tensor:
        if self.weight not in source.checkpoint.weights:  # an importance that was not measured
            return self._zeros(index)
        if name not in self._read:
            self._read[name] = self.readers[name](self.weight)
        return self._read[name][self.spans[index]].to(self.dtype)

    def _zeros(self, index: int) -> Tensor:
        span = self.spans[index]
        return torch.zeros((len(range(span.start, span.stop, self.every)), *self.shape[1:]), dtype=self.dtype)

    def _step(self, name: str, index: int) -> Tensor:
        step = self.recipe.steps[name]
        if name not in self._statistics:
            blocks = partial(self._blocks, name)
            numbers = self._numbers(name)
            self._statistics[name] = {key: of(blocks, **numbers) for key, of in step.signature.statistics.items()}
        arguments = self._inputs(name, index) | self._statistics[name] | self._numbers(name)
        if step.signature.draws:
            arguments["draw"] = partial(self._draw, index)
        try:
            return step.method(**arguments)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error

    def _inputs(self, name: str, index: int) -> dict[str, object]:
        step = self.recipe.steps[name]
        base = step.inputs.get("base")
        base = base if isinstance(base, str) else None
        values: dict[str, object] = {}
        for argument, wanted in step.signature.inputs.items():
            given = step.inputs[argument]
            made = []
            for one in [given] if isinstance(given, str) else given:
                tensor = self.value(one, index, base)
                if wanted.kind == Kind.TASK_VECTOR and self.recipe.kind(one) == Kind.WEIGHT:
                    assert base is not None, "a change is one of an input called base"
                    tensor = tensor - self.value(base, index)
                made.append(tensor)
            values[argument] = made if wanted.many else made[0]
        return values

    def _blocks(self, name: str, sample: int | None = None) -> Iterator[tuple[Tensor, ...]]:
        every = max(1, torch.Size(self.shape).numel() // sample) if sample else 1
        if every > 1:
            yield from MergedWeight(self.recipe, self.readers, self.weight, self.shape, every)._blocks(name)
            return
        for index in range(len(self.spans)):
            inputs = self._inputs(name, index)
            inputs.pop("base", None)
            yield tuple(t for given in inputs.values() for t in (given if isinstance(given, list) else [given]))  # type: ignore[misc]

    def _numbers(self, name: str) -> dict[str, object]:
        step = self.recipe.steps[name]
        given = {**step.signature.numbers, **step.numbers}
        return {key: number_for_block(number, self.block) if is_by_block(number) else number for key, number in given.items()}

    def _change(self, name: str, source: Adapter, index: int, base: str | None) -> Tensor:
        span, layer = self.spans[index], source.layer_of(self.weight)
        if layer is None:
            return self._zeros(index)
        if name not in self._changes:
            self._changes[name] = lora_delta(layer).reshape(self.shape)
        change = self._changes[name][span].to(self.dtype)
        if DORA not in layer.tensors:
            return change
        assert base is not None, "a DoRA without a base is refused by the recipe"
        return dora_delta(layer, change, self.value(base, index), span)

    def _draw(self, index: int, seed: int, number: int, shape: tuple[int, ...]) -> Tensor:
        generator = rng.generator(seed, "merging", f"{self.weight}/{number}", index)
        return torch.rand(tuple(shape), generator=generator)
