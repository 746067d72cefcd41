"""What a method of merging takes and gives: weights, deltas, numbers. Its annotations say it, and planning reads them.

A weight is what a model holds; a delta is a difference of two weights, such as a LoRA. Knows annotations only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from inspect import signature
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, get_type_hints

from annotated_types import Gt, Le, MinLen
from torch import Tensor

from sdft.types import Fraction


class Kind(Enum):
    """Of an input or a result."""

    WEIGHT = "a weight"
    DELTA = "a delta"
    TASK_VECTOR = "a change of base"
    """Given as a delta, or as a weight from which the input `base` is taken; the method sees a delta."""
    IMPORTANCE = "an importance"
    """Of each number of a weight to the loss: a mean squared gradient, 0 where none was measured."""


Weight = Annotated[Tensor, Kind.WEIGHT]
Delta = Annotated[Tensor, Kind.DELTA]
Weights = Annotated[Sequence[Tensor], Kind.WEIGHT, MinLen(1)]
Deltas = Annotated[Sequence[Tensor], Kind.DELTA, MinLen(1)]
TaskVector = Annotated[Tensor, Kind.TASK_VECTOR]
TaskVectors = Annotated[Sequence[Tensor], Kind.TASK_VECTOR, MinLen(1)]
TwoOrMoreTaskVectors = Annotated[Sequence[Tensor], Kind.TASK_VECTOR, MinLen(2)]
Importances = Annotated[Sequence[Tensor], Kind.IMPORTANCE, MinLen(1)]

Preset = Literal["style", "content", "structure"]
if TYPE_CHECKING:
    BlockFraction = float
    BlockFloat = float
else:
    # What a config may say; a method gets the number of the weight's block (`blocks`).
    BlockFraction = Fraction | Preset | dict[str, Fraction]
    BlockFloat = float | Preset | dict[str, float]
Density = Annotated[float, Gt(0), Le(1)]



class Chunks(Protocol):
    """The inputs of a method, `base` left out, piece by piece from the start of the tensor; may be asked for anew."""

    def __call__(self, sample: int | None = None) -> Iterator[tuple[Tensor, ...]]:
        """sample: only about so many numbers of each input, in whole rows at equal distances."""
        ...


Draw = Callable[[int, int, Sequence[int]], Tensor]
"""(seed, input, shape) -> numbers in [0, 1), which depend on these, on the weight's name and on the piece alone."""


@dataclass(frozen=True)
class Statistic:
    """Marks an argument that is a figure of whole tensors, computed before the first piece of the result."""

    of: Callable[..., Any]
    """(blocks, the method's numbers) -> the figure."""


@dataclass(frozen=True)
class PerInput:
    """Marks a list that has one element for each of the named inputs."""

    inputs: str


@dataclass(frozen=True)
class Input:
    """An argument that is a tensor, or several."""

    kind: Kind
    many: bool
    at_least: int = 1


@dataclass(frozen=True)
class Signature:
    """A method's arguments by their roles."""

    inputs: Mapping[str, Input]
    numbers: Mapping[str, Any]
    """By name their defaults."""
    per_input: Mapping[str, str]
    statistics: Mapping[str, Callable[..., Any]]
    draws: bool
    result: Kind


@cache
def signature_of(method: Callable[..., Tensor]) -> Signature:
    """Reads a method's annotations."""
    hints = get_type_hints(method, include_extras=True)
    inputs, statistics = {}, {}
    numbers: dict[str, Any] = {}
    per_input: dict[str, str] = {}
    for name, parameter in signature(method).parameters.items():
        marks = getattr(hints[name], "__metadata__", ())
        kind, statistic, paired = (first(marks, wanted) for wanted in (Kind, Statistic, PerInput))
        if kind is not None:
            at_least = next((mark.min_length for mark in marks if isinstance(mark, MinLen)), 1)
            inputs[name] = Input(kind, hints[name].__origin__ is not Tensor, at_least)
        elif statistic is not None:
            statistics[name] = statistic.of
        elif name != "draw":
            numbers[name] = parameter.default
        per_input |= {name: paired.inputs} if paired else {}
    (result,) = hints["return"].__metadata__
    return Signature(inputs, numbers, per_input, statistics, "draw" in hints, result)


def first(marks: Sequence[Any], wanted: type) -> Any:
    """The first of an annotation's marks that is of a type; None where none is."""
    return next((mark for mark in marks if isinstance(mark, wanted)), None)
