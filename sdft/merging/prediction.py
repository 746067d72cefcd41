"""What the result of a merge predicts: the prediction types of its inputs, carried through the steps.

A model that does not say what it predicts counts as epsilon, as it does when it is loaded; a LoRA that does not say
fits any model. What predicts different things cannot be mixed in one step, unless `prediction=` says what results.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from sdft.errors import UserError
from sdft.formats.metadata import says_zero_terminal_snr, stated_prediction
from sdft.formats.model_checkpoint import Predicts
from sdft.merging.annotations import Kind
from sdft.merging.recipe import Recipe, Step, topological_order
from sdft.merging.sources import Adapter, Model, Source

Prediction = Literal["epsilon", "v_prediction"]


def predicts(recipe: Recipe, told: Prediction | None = None) -> Predicts | None:
    """What the result of a recipe predicts; None for a LoRA of LoRAs that do not say.

    told: the prediction type of the result, in place of those of the inputs.
    Raises UserError that names two inputs of one step that predict different things.
    """
    found = {name: of_source(source) for name, source in recipe.sources.items()}
    if told is not None:
        zero = any(one.zero_terminal_snr for one in found.values() if one is not None and one.type == told)
        return Predicts(told, zero)
    for name in topological_order(recipe.steps, recipe.result):
        found[name] = of_step(recipe, recipe.steps[name], found)
    return found[recipe.result]


def of_source(source: Source) -> Predicts | None:
    """What a model or a LoRA predicts; None for a LoRA that does not say, and for an importance."""
    if isinstance(source, Model):
        return source.checkpoint.predicts
    if isinstance(source, Adapter) and (stated := stated_prediction(source.lora.metadata)):
        return Predicts(stated, says_zero_terminal_snr(source.lora.metadata))
    return None


def of_step(recipe: Recipe, step: Step, found: Mapping[str, Predicts | None]) -> Predicts | None:
    """What the result of one step predicts."""
    weights: dict[str, Predicts] = {}
    changes: dict[str, Predicts] = {}
    for argument, one in step.input_items():
        kind, given = step.signature.inputs[argument].kind, found[one]
        if kind == Kind.IMPORTANCE or given is None:
            continue
        (weights if kind == Kind.WEIGHT else changes)[one] = given
    # A difference of two models is that of the first: v minus epsilon turns a model that predicts epsilon into v.
    if step.signature.result == Kind.DELTA and weights and not changes:
        return next(iter(weights.values()))
    refuse_mixture(recipe, changes)
    # What is added to the base decides: a LoRA that was trained for v makes a model that predicts v of it. One that was
    # trained for epsilon is used on models of either type, and does not change theirs.
    if changes and weights and all(recipe.kind(one) == Kind.DELTA for one in changes):
        changes = {one: given for one, given in changes.items() if given.type == "v_prediction"}
    refuse_mixture(recipe, changes or weights)
    return next(iter((changes or weights).values()), None)


def refuse_mixture(recipe: Recipe, found: Mapping[str, Predicts]) -> None:
    """Raise UserError if two inputs predict different things."""
    if len(set(found.values())) > 1:
        (a, ours), *rest = found.items()
        b, theirs = next((one, given) for one, given in rest if given != ours)
        names = [recipe.sources[one].where if one in recipe.sources else f"step {one}" for one in (a, b)]
        raise UserError(
            f"{names[0]} predicts {ours} and {names[1]} {theirs}: a mixture of them predicts neither; pass "
            "prediction=epsilon or prediction=v_prediction to mix them all the same, labelled so"
        )
