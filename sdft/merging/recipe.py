"""A merge as a graph of steps: each is a method, its inputs (files or other steps) and its numbers.

All that can be wrong with a recipe is found here, before any weight is read. Must not know how numbers are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sdft.errors import UserError
from sdft.merging import methods, sparsify
from sdft.merging.annotations import Kind, Signature, signature_of
from sdft.merging.blocks import is_by_block, refuse_bad_block_map
from sdft.merging.sources import Adapter, Importance, Model, Source, open_source, refuse_mismatch

METHODS: Mapping[str, Callable[..., Tensor]] = {
    method.__name__: method
    for method in (
        methods.weighted_sum,
        methods.linear,
        methods.fisher,
        methods.difference,
        methods.add,
        methods.sum_of,
        methods.add_difference,
        methods.train_difference,
        methods.slerp,
        methods.model_stock,
        methods.geometric_median,
        methods.cosine_adaptive,
        methods.rotate,
        methods.clamp,
        sparsify.ties,
        sparsify.dare,
        sparsify.dare_ties,
        sparsify.della,
    )
}
"""All that a recipe may name."""
REMEDIES = {
    (Kind.WEIGHT, Kind.DELTA): "take another from it (method difference)",
    (Kind.DELTA, Kind.WEIGHT): "add it to a model first (merge=bake, method add)",
}
NO_IMPORTANCE = "only `importances` of fisher are files that train.py wrote with callbacks=importance"


@dataclass(frozen=True)
class Step:
    """One method at work. An input is the name of a step, else `nano`, a folder or a file."""

    method: Callable[..., Tensor]
    inputs: Mapping[str, str | Sequence[str]]
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def signature(self) -> Signature:
        return signature_of(self.method)

    def input_items(self) -> Iterator[tuple[str, str]]:
        """(argument, input), in the order of the method's arguments."""
        for argument in self.signature.inputs:
            given = self.inputs[argument]
            yield from ((argument, one) for one in ([given] if isinstance(given, str) else given))


@dataclass(frozen=True)
class Recipe:
    """A sound graph and its opened inputs."""

    steps: Mapping[str, Step]
    result: str
    """The step whose value is written."""
    sources: Mapping[str, Source]
    """By what the steps call them, in the order of their first use."""

    def kind(self, name: str) -> Kind:
        """Whether a step or a source is a weight, a delta or an importance."""
        return self.steps[name].signature.result if name in self.steps else self.sources[name].kind

    @property
    def models(self) -> list[Model]:
        return [source for source in self.sources.values() if isinstance(source, Model)]

    @property
    def adapters(self) -> list[Adapter]:
        return [source for source in self.sources.values() if isinstance(source, Adapter)]

    @property
    def importances(self) -> list[Importance]:
        return [source for source in self.sources.values() if isinstance(source, Importance)]

    def numbers_by_block(self) -> dict[str, Any]:
        """`step.argument` -> numbers that differ between blocks."""
        return {
            f"{name}.{argument}": number
            for name, step in self.steps.items()
            for argument, number in step.numbers.items()
            if is_by_block(number)
        }


def open_recipe(steps: Mapping[str, Step]) -> Recipe:
    """Opens the inputs and checks everything. Raises UserError that names the step and the argument."""
    alone = len(steps) == 1
    for name, step in steps.items():
        refuse_bad_arguments("" if alone else f"{name}.", step)
    result = find_result(steps)
    sources: dict[str, Source] = {}
    for name in topological_order(steps, result):
        for argument, one in steps[name].input_items():
            if one not in steps and one not in sources:
                sources[one] = open_source(argument if alone else f"{name}.{argument}", one)
    recipe = Recipe(steps, result, sources)
    for name, step in steps.items():
        refuse_wrong_kinds("" if alone else f"{name}.", step, recipe)
    refuse_mismatch(recipe.models, recipe.adapters, recipe.importances)
    return recipe


def refuse_bad_arguments(prefix: str, step: Step) -> None:
    """Raise UserError for inputs that are missing, too many or too few, and for numbers that do not go with them."""
    wanted, method = step.signature.inputs, step.method.__name__
    for argument in wanted:
        if argument not in step.inputs:
            raise UserError(f"{prefix}{argument} is not set: {method} needs it, {prefix}{argument}=...")
    for argument, given in step.inputs.items():
        if argument not in wanted:
            raise UserError(f"{prefix}{argument}: {method} has no such input; it takes {', '.join(wanted)}")
        many = not isinstance(given, str)
        if many != wanted[argument].many:
            shape = "a list of inputs, [x, y]" if wanted[argument].many else "one input"
            raise UserError(f"{prefix}{argument}={given}: {method} takes {shape} there")
        if many and len(given) < wanted[argument].at_least:
            raise UserError(f"{prefix}{argument}: {method} needs at least {wanted[argument].at_least} inputs there")
    for argument, number in step.numbers.items():
        if argument not in step.signature.numbers:
            known = ", ".join(step.signature.numbers)
            raise UserError(f"{prefix}{argument}: {method} has no such number; it takes {known or 'none'}")
        refuse_bad_block_map(f"{prefix}{argument}", number)
    for argument, paired in step.signature.per_input.items():
        listed: Any = {**step.inputs, **step.numbers}.get(argument)
        if listed is not None and len(listed) != len(step.inputs[paired]):
            raise UserError(f"{prefix}{argument}: {len(listed)} for {len(step.inputs[paired])} {paired}; one for each")


def find_result(steps: Mapping[str, Step]) -> str:
    """The one step that no other uses. Raises UserError where there is none, or more than one."""
    used = {one for step in steps.values() for _, one in step.input_items()}
    ends = [name for name in steps if name not in used]
    if not steps:
        raise UserError("the recipe has no steps; write them under `steps:`")
    if len(ends) > 1:
        raise UserError(f"steps {' and '.join(ends)} lead nowhere both; all but one must be the input of another step")
    if not ends:
        raise UserError(f"steps {', '.join(steps)} go round in a circle; one of them must not be used by the others")
    return ends[0]


def topological_order(steps: Mapping[str, Step], result: str) -> list[str]:
    """The steps, each after those that it uses. Raises UserError for a circle."""
    done: dict[str, None] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join([*path[path.index(name) :], name])
            raise UserError(f"steps go round in a circle: {circle}; one of them must not use the next")
        for _, one in steps[name].input_items():
            if one in steps and one not in done:
                visit(one, (*path, name))
        done[name] = None

    for name in [result, *steps]:
        if name not in done:
            visit(name, ())
    return list(done)


def refuse_wrong_kinds(prefix: str, step: Step, recipe: Recipe) -> None:
    """Raise UserError where a weight stands for a delta, a delta for a weight, or an importance for either."""
    for argument, one in step.input_items():
        wanted, given = step.signature.inputs[argument].kind, recipe.kind(one)
        if given not in ((Kind.WEIGHT, Kind.DELTA) if wanted == Kind.TASK_VECTOR else (wanted,)):
            remedy = REMEDIES.get((given, wanted), NO_IMPORTANCE)
            method = step.method.__name__
            raise UserError(f"{prefix}{argument}={one}: is {given.value}, and {method} needs {wanted.value}; {remedy}")
        source = recipe.sources.get(one)
        if isinstance(source, Adapter) and source.depends_on_base and "base" not in step.signature.inputs:
            message = "is a DoRA, whose change depends on the model; bake it into one first (merge=bake)"
            raise UserError(f"{prefix}{argument}={one}: {message}")
