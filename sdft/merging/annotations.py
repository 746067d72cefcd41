"""The contract of merge methods: `MergeMethod`, and the annotations that say which argument is what.

`sdft.merging.methods` shows how to write one. Must not depend on methods, files or models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from inspect import Parameter, isfunction, signature
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints

from annotated_types import Gt, Le, MinLen
from torch import Tensor

from sdft.errors import UserError
from sdft.types import Fraction

T = TypeVar("T")


class MergeMethod(Protocol):
    """A pure function from tensors and numbers to one tensor of the same shape.

    It is called with keyword arguments, once for each chunk of each weight. Every argument is annotated:

    - tensors by the aliases below (`Weight`, `Weights`, `Delta`, `TaskVectors`, ...); at least one;
    - a statistic of whole tensors by an alias of `sdft.merging.statistics`, such as `Gram`;
    - a function that draws random numbers by `Uniform`;
    - everything else is a number (also a list or a string) that the config sets. The config checks its type and
      range, so `Annotated[float, Gt(0)]` works as elsewhere. `BlockFraction` and `BlockFloat` may differ by SDXL block.

    The return annotation is `Weight` or `Delta`. With task vectors, an argument `base: Weight` is required.
    """

    __name__: str
    __qualname__: str
    __module__: str

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...

    def __hash__(self) -> int: ...


class Kind(Enum):
    """What an input or a result is. The values stand in error messages."""

    WEIGHT = "a weight"
    DELTA = "a delta"
    """The difference of two weights, such as the change that a LoRA makes."""
    TASK_VECTOR = "a task vector (a model fine-tuned from base, or a LoRA)"
    """The recipe gives a weight, from which the input `base` is subtracted, or a delta. The method gets a delta."""
    IMPORTANCE = "an importance"
    """The mean squared gradient of each weight (the diagonal of the Fisher information); 0 where not measured."""


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
    # What a config may hold. The method gets the number of the block that the weight belongs to (`blocks`).
    BlockFraction = Fraction | Preset | dict[str, Fraction]
    BlockFloat = float | Preset | dict[str, float]
Density = Annotated[float, Gt(0), Le(1)]


class Chunks(Protocol):
    """The input tensors of a method without `base`, chunk by chunk from the first row; may be called repeatedly."""

    def __call__(self, sample: int | None = None) -> Iterator[tuple[Tensor, ...]]:
        """sample: yield only about so many elements of each input, in whole rows at equal distances."""
        ...


Uniform = Callable[[int, int, Sequence[int]], Tensor]
"""(seed, index of the input, shape) -> random numbers in [0, 1).

They depend only on these, the weight's name and the chunk, so threads do not change a result.
"""


@dataclass(frozen=True)
class Statistic:
    """Marks an argument that is a statistic of whole tensors, computed before the first chunk of the result."""

    compute: Callable[..., Any]
    """(chunks, the method's numbers as keyword arguments) -> the statistic."""


@dataclass(frozen=True)
class PerInput:
    """Marks a list that has one element for each of the inputs in the argument `inputs`."""

    inputs: str


@dataclass(frozen=True)
class Input:
    """An argument that is a tensor, or a list of them."""

    kind: Kind
    is_list: bool
    min_length: int = 1


@dataclass(frozen=True)
class MethodSignature:
    """The arguments of a merge method by their roles."""

    inputs: Mapping[str, Input]
    numbers: Mapping[str, Any]
    """The default of each; `inspect.Parameter.empty` where it is required."""
    per_input: Mapping[str, str]
    statistics: Mapping[str, Callable[..., Any]]
    uniform: str | None
    """The argument that draws random numbers."""
    result: Kind


@cache
def signature_of(method: MergeMethod) -> MethodSignature:
    """Reads the annotations of a merge method. Raises UserError where it breaks the contract of `MergeMethod`."""
    if not isfunction(method):
        raise UserError(f"method={method!r}: is not a Python function; pass one with annotated arguments")
    where = f"method {method.__module__}.{method.__qualname__}"
    try:
        hints = get_type_hints(method, include_extras=True)
    except (NameError, TypeError) as error:
        raise UserError(f"{where}: its annotations cannot be evaluated ({error})") from error
    inputs, statistics = {}, {}
    numbers: dict[str, Any] = {}
    per_input: dict[str, str] = {}
    uniform = None
    for name, parameter in signature(method).parameters.items():
        refuse_bad_parameter(where, parameter, hints.get(name))
        metadata = metadata_of(hints[name])
        kind, statistic = first_of(metadata, Kind), first_of(metadata, Statistic)
        paired = first_of(metadata, PerInput)
        if kind is not None:
            length = first_of(metadata, MinLen)
            inputs[name] = Input(kind, get_args(hints[name])[0] is not Tensor, length.min_length if length else 1)
        elif statistic is not None:
            statistics[name] = statistic.compute
        elif hints[name] == Uniform:
            uniform = name
        else:
            numbers[name] = parameter.default
        per_input |= {name: paired.inputs} if paired else {}
    result = first_of(metadata_of(hints.get("return")), Kind)
    if result not in (Kind.WEIGHT, Kind.DELTA):
        raise UserError(f"{where}: its return annotation must be Weight or Delta of sdft.merging.annotations")
    if not inputs:
        raise UserError(f"{where}: takes no tensor; annotate its inputs with Weight, Delta, TaskVectors or the like")
    if any(one.kind == Kind.TASK_VECTOR for one in inputs.values()) and "base" not in inputs:
        raise UserError(f"{where}: takes task vectors, so it needs an argument base: Weight")
    if wrong := [paired for paired in per_input.values() if paired not in inputs or not inputs[paired].is_list]:
        raise UserError(f"{where}: PerInput({wrong[0]!r}) does not name a list of inputs")
    return MethodSignature(inputs, numbers, per_input, statistics, uniform, result)


def refuse_bad_parameter(where: str, parameter: Parameter, hint: object) -> None:
    """Raise UserError for a parameter that cannot be passed by keyword or whose role is unknown."""
    if parameter.kind not in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY):
        raise UserError(f"{where}: {parameter} is not supported; every argument must be passed by its own keyword")
    if hint is None:
        raise UserError(f"{where}: {parameter.name} has no annotation; tensors are Weight, Delta, TaskVectors, ...")
    if hint is Tensor:
        raise UserError(f"{where}: {parameter.name} is annotated as a plain Tensor; use Weight, Delta or TaskVector")


def is_merge_method(function: object) -> bool:
    """Whether something is a function whose return annotation is that of a merge method."""
    if not isfunction(function):
        return False
    return first_of(metadata_of(get_type_hints(function, include_extras=True).get("return")), Kind) is not None


def metadata_of(hint: object) -> tuple[Any, ...]:
    """What `Annotated` adds to a type; nothing for other types."""
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


def first_of(metadata: Sequence[Any], wanted: type[T]) -> T | None:
    """The first element of a type, or None."""
    return next((one for one in metadata if isinstance(one, wanted)), None)
