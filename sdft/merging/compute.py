"""Computes one weight of a recipe's result, chunk by chunk, so that memory does not grow with the model.

Knows the graph, chunks and statistics. Must not depend on the format of the output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from sdft import rng
from sdft.errors import UserError
from sdft.formats.lora_delta import dora_delta, lora_delta, rotation_delta
from sdft.formats.lora_layer import DORA, ROTATIONS, Layer
from sdft.merging.annotations import Kind
from sdft.merging.blocks import block_of, is_by_block, number_for_block
from sdft.merging.input_files import ReadWeight
from sdft.merging.recipe import Recipe
from sdft.merging.sources import Adapter, TensorSource

CHUNK_SIZE = 2**18
"""Elements in a chunk of a weight: few enough for a core's cache. Random numbers are drawn chunk by chunk, so the
results of methods that use them depend on it."""


def nonfinite_message(recipe: Recipe, readers: Mapping[str, ReadWeight], weight: str) -> str:
    """The error message for a weight whose result is NaN or infinite: names the inputs that hold such values."""
    damaged = []
    for name, source in recipe.sources.items():
        if isinstance(source, Adapter):
            tensors = source.tensors_of(weight)
        else:
            tensors = [readers[name](weight)] if weight in source.checkpoint.weights else []
        if not all(tensor.isfinite().all() for tensor in tensors):
            damaged.append(source.where)
    cause = f"{' and '.join(damaged)} is damaged, it holds" if damaged else "no input is damaged, but the numbers give"
    return f"{weight}: {cause} NaN or infinity there; nothing is written"


class MergedWeight:
    """One weight of a recipe's result.

    weight: its name, `part/name`. shape: its shape. readers: those of `OpenInputs`.
    stride: 1 for all rows; n for every n-th row, as a sample for statistics.
    """

    def __init__(
        self, recipe: Recipe, readers: Mapping[str, ReadWeight], weight: str, shape: tuple[int, ...], stride: int = 1
    ):
        self.recipe, self.readers, self.weight, self.shape, self.stride = recipe, readers, weight, shape, stride
        self.block = block_of(weight)
        self._read: dict[str, Tensor] = {}
        self._lora_deltas: dict[tuple[str, str | None], Tensor] = {}
        """By source, and by the base of a rotation."""
        self._statistics: dict[str, dict[str, object]] = {}
        self._chunk_values: dict[tuple[str, int], Tensor] = {}
        """The values of sources and steps for the current chunk, which several steps may use."""

    def chunks(self) -> Iterator[Tensor]:
        """The result from its first row to its last, in the dtype of the computation."""
        for index in range(len(self.spans)):
            yield self.value(self.recipe.result, index)

    @cached_property
    def spans(self) -> list[slice]:
        """The rows of each chunk."""
        rows = self.shape[0] if self.shape else 1
        step = self.stride * max(1, CHUNK_SIZE // max(1, torch.Size(self.shape[1:]).numel()))
        return [slice(start, min(start + step, rows), self.stride) for start in range(0, rows, step)]

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the computation: fp32, or fp64 if the weight is fp64 in a model."""
        found = {model.checkpoint.weights[self.weight].dtype for model in self.recipe.models}
        return torch.float64 if "F64" in found else torch.float32

    def value(self, name: str, index: int, base: str | None = None) -> Tensor:
        """Chunk `index` of a step or a source; `base` is the input that a DoRA or a rotation is applied to."""
        source = self.recipe.sources.get(name)
        if isinstance(source, Adapter):
            return self._adapter_delta(name, source, index, base)
        if (name, index) not in self._chunk_values:
            value = self._step(name, index) if source is None else self._stored(name, source, index)
            if any(i != index for _, i in self._chunk_values):
                self._chunk_values = {}
            self._chunk_values[name, index] = value
        return self._chunk_values[name, index]

    def _stored(self, name: str, source: TensorSource, index: int) -> Tensor:
        if self.weight not in source.checkpoint.weights:  # an importance that was not measured
            return self._zeros(index)
        if name not in self._read:
            self._read[name] = self.readers[name](self.weight)
        return self._read[name][self.spans[index]].to(self.dtype)

    def _zeros(self, index: int) -> Tensor:
        span = self.spans[index]
        return torch.zeros((len(range(span.start, span.stop, self.stride)), *self.shape[1:]), dtype=self.dtype)

    def _step(self, name: str, index: int) -> Tensor:
        step = self.recipe.steps[name]
        if name not in self._statistics:
            chunks = partial(self._input_chunks, name)
            numbers = self._numbers(name)
            self._statistics[name] = {
                key: compute(chunks, **numbers) for key, compute in step.signature.statistics.items()
            }
        arguments = self._inputs(name, index) | self._statistics[name] | self._numbers(name)
        if step.signature.uniform is not None:
            arguments[step.signature.uniform] = partial(self._uniform, index)
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
            tensors = []
            for one in [given] if isinstance(given, str) else given:
                tensor = self.value(one, index, base)
                if wanted.kind == Kind.TASK_VECTOR and self.recipe.kind(one) == Kind.WEIGHT:
                    assert base is not None, "a change is one of an input called base"
                    tensor = tensor - self.value(base, index)
                tensors.append(tensor)
            values[argument] = tensors if wanted.is_list else tensors[0]
        return values

    def _input_chunks(self, name: str, sample: int | None = None) -> Iterator[tuple[Tensor, ...]]:
        stride = max(1, torch.Size(self.shape).numel() // sample) if sample else 1
        if stride > 1:
            yield from MergedWeight(self.recipe, self.readers, self.weight, self.shape, stride)._input_chunks(name)
            return
        for index in range(len(self.spans)):
            inputs = self._inputs(name, index)
            inputs.pop("base", None)
            yield tuple(t for given in inputs.values() for t in (given if isinstance(given, list) else [given]))  # type: ignore[misc]

    def _numbers(self, name: str) -> dict[str, object]:
        step = self.recipe.steps[name]
        given = {**step.signature.numbers, **step.numbers}
        return {key: number_for_block(one, self.block) if is_by_block(one) else one for key, one in given.items()}

    def _adapter_delta(self, name: str, source: Adapter, index: int, base: str | None) -> Tensor:
        span, layer = self.spans[index], source.layer_of(self.weight)
        if (vector := source.lora.vectors.get(self.weight)) is not None:
            return vector[span].to(self.dtype)
        if layer is None:
            return self._zeros(index)
        if layer.kind in ROTATIONS:
            return self._rotation_delta(name, layer, base)[span]
        if (name, None) not in self._lora_deltas:
            self._lora_deltas[name, None] = lora_delta(layer).reshape(self.shape)
        delta = self._lora_deltas[name, None][span].to(self.dtype)
        if DORA not in layer.tensors:
            return delta
        assert base is not None, "open_recipe refuses a DoRA without a base"
        return dora_delta(layer, delta, self.value(base, index), span)

    def _rotation_delta(self, name: str, layer: Layer, base: str | None) -> Tensor:
        """The delta of all rows, each of which depends on other rows of the base."""
        assert base is not None, "open_recipe refuses a rotation without a base"
        if (name, base) not in self._lora_deltas:
            whole = MergedWeight(self.recipe, self.readers, self.weight, self.shape)
            rows = [whole.value(base, index) for index in range(len(whole.spans))]
            self._lora_deltas[name, base] = rotation_delta(layer, torch.cat(rows))
        return self._lora_deltas[name, base]

    def _uniform(self, index: int, seed: int, input_index: int, shape: Sequence[int]) -> Tensor:
        generator = rng.generator(seed, "merging", f"{self.weight}/{input_index}", index)
        return torch.rand(tuple(shape), generator=generator)
