"""A merge as a directed acyclic graph of steps: each is a method, its inputs (files or other steps) and its numbers.

Everything that can be wrong with a recipe is reported here, before any weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from inspect import Parameter
from typing import Any

from sdft.errors import UserError
from sdft.merging import methods, sparsify
from sdft.merging.annotations import Kind, MergeMethod, MethodSignature, is_merge_method, signature_of
from sdft.merging.blocks import is_by_block, refuse_bad_block_map
from sdft.merging.sources import Adapter, Importance, Model, Source, open_source, refuse_mismatch

METHODS: Mapping[str, MergeMethod] = {
    name: function
    for module in (methods, sparsify)
    for name, function in vars(module).items()
    if is_merge_method(function) and function.__module__ == module.__name__
}
"""The methods that a recipe may name without their module: all functions of `methods` and `sparsify` with the return
annotation of a merge method."""
REMEDIES = {
    (Kind.WEIGHT, Kind.DELTA): "subtract another model from it (method difference)",
    (Kind.DELTA, Kind.WEIGHT): "add it to a model first (merge=bake, method add)",
}
NO_IMPORTANCE = "only `importances` of fisher takes files that train.py wrote with callbacks=importance"


@dataclass(frozen=True)
class Step:
    """The call of one merge method."""

    method: MergeMethod
    inputs: Mapping[str, str | Sequence[str]]
    """By argument: the name of another step, else `nano`, a run folder, a model folder or a file; or a list of them."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """The method's other arguments."""

    @property
    def signature(self) -> MethodSignature:
        return signature_of(self.method)

    def input_items(self) -> Iterator[tuple[str, str]]:
        """(argument, input) of every input, in the order of the method's arguments."""
        for argument in self.signature.inputs:
            given = self.inputs[argument]
            yield from ((argument, one) for one in ([given] if isinstance(given, str) else given))


@dataclass(frozen=True)
class Recipe:
    """A checked graph and its opened inputs."""

    steps: Mapping[str, Step]
    result: str
    """The name of the step whose value is written."""
    sources: Mapping[str, Source]
    """By the names that the steps use, in the order of their first use."""

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
        """`step.argument` -> numbers that differ between SDXL blocks."""
        return {
            f"{name}.{argument}": number
            for name, step in self.steps.items()
            for argument, number in step.numbers.items()
            if is_by_block(number)
        }


def open_recipe(steps: Mapping[str, Step]) -> Recipe:
    """Checks the steps and opens their inputs. Raises UserError that names the step and the argument."""
    prefixes = {name: "" if len(steps) == 1 else f"{name}." for name in steps}
    for name, step in steps.items():
        refuse_bad_arguments(prefixes[name], step)
    result = find_result(steps)
    sources: dict[str, Source] = {}
    for name in topological_order(steps, result):
        for argument, one in steps[name].input_items():
            if one not in steps and one not in sources:
                sources[one] = open_source(f"{prefixes[name]}{argument}", one)
    recipe = Recipe(steps, result, sources)
    for name, step in steps.items():
        refuse_wrong_kinds(prefixes[name], step, recipe)
    refuse_mismatch(recipe.models, recipe.adapters, recipe.importances)
    return recipe


def import_method(path: str) -> MergeMethod:
    """The merge method at a dotted path. Raises UserError where there is none."""
    module, _, name = path.rpartition(".")
    try:
        method: MergeMethod = vars(import_module(module))[name]
    except (ImportError, KeyError) as error:
        raise UserError(f"method={path}: cannot be imported ({error}); pass module.function") from error
    signature_of(method)
    return method


def method_name(method: MergeMethod) -> str:
    """How a recipe names a method: built-in ones by their name, others by their dotted path."""
    name = method.__name__
    return name if METHODS.get(name) is method else f"{method.__module__}.{method.__qualname__}"


def refuse_bad_arguments(prefix: str, step: Step) -> None:
    """Raise UserError for missing or unknown arguments, and for lists of the wrong length."""
    signature = step.signature
    wanted, method = signature.inputs, step.method.__name__
    for argument in wanted:
        if argument not in step.inputs:
            raise UserError(f"{prefix}{argument} is not set: {method} needs it, {prefix}{argument}=...")
    for argument, given in step.inputs.items():
        if argument not in wanted:
            raise UserError(f"{prefix}{argument}: {method} has no such input; it takes {', '.join(wanted)}")
        is_list, expected = not isinstance(given, str), wanted[argument]
        if is_list != expected.is_list:
            shape = "a list of inputs, [x, y]" if expected.is_list else "one input"
            raise UserError(f"{prefix}{argument}={given}: {method} takes {shape} there")
        if is_list and len(given) < expected.min_length:
            raise UserError(f"{prefix}{argument}: {method} needs at least {expected.min_length} inputs there")
    for argument, default in signature.numbers.items():
        if default is Parameter.empty and argument not in step.numbers:
            raise UserError(f"{prefix}{argument} is not set: {method} needs it, {prefix}{argument}=...")
    for argument, number in step.numbers.items():
        if argument not in signature.numbers:
            known = ", ".join(signature.numbers)
            raise UserError(f"{prefix}{argument}: {method} has no such number; it takes {known or 'none'}")
        refuse_bad_block_map(f"{prefix}{argument}", number)
    for argument, paired in signature.per_input.items():
        listed: Any = {**step.inputs, **step.numbers}.get(argument)
        if listed is not None and len(listed) != len(step.inputs[paired]):
            raise UserError(f"{prefix}{argument}: {len(listed)} for {len(step.inputs[paired])} {paired}; one for each")


def find_result(steps: Mapping[str, Step]) -> str:
    """The one step that is not the input of another. Raises UserError if there is none, or more than one."""
    used = {one for step in steps.values() for _, one in step.input_items()}
    ends = [name for name in steps if name not in used]
    if not steps:
        raise UserError("the recipe has no steps; write them under `steps:`")
    if len(ends) > 1:
        raise UserError(f"steps {' and '.join(ends)} are not used; all but one must be the input of another step")
    if not ends:
        raise UserError(f"steps {', '.join(steps)} form a cycle; one of them must not be used by the others")
    return ends[0]


def topological_order(steps: Mapping[str, Step], result: str) -> list[str]:
    """The steps, each after its inputs. Raises UserError for a cycle."""
    done: dict[str, None] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            cycle = " -> ".join([*path[path.index(name) :], name])
            raise UserError(f"steps form a cycle: {cycle}; one of them must not use the next")
        for _, one in steps[name].input_items():
            if one in steps and one not in done:
                visit(one, (*path, name))
        done[name] = None

    for name in [result, *steps]:
        if name not in done:
            visit(name, ())
    return list(done)


def refuse_wrong_kinds(prefix: str, step: Step, recipe: Recipe) -> None:
    """Raise UserError where a weight is given for a delta, a delta for a weight, or an importance for either."""
    for argument, one in step.input_items():
        wanted, given = step.signature.inputs[argument].kind, recipe.kind(one)
        if given not in ((Kind.WEIGHT, Kind.DELTA) if wanted == Kind.TASK_VECTOR else (wanted,)):
            remedy = REMEDIES.get((given, wanted), NO_IMPORTANCE)
            method = step.method.__name__
            raise UserError(f"{prefix}{argument}={one}: is {given.value}, and {method} needs {wanted.value}; {remedy}")
        source = recipe.sources.get(one)
        if isinstance(source, Adapter) and source.kinds_on_base and "base" not in step.signature.inputs:
            kinds, remedy = " and ".join(source.kinds_on_base), "bake it into one first (merge=bake)"
            raise UserError(f"{prefix}{argument}={one}: is {kinds}, whose change depends on the model; {remedy}")
