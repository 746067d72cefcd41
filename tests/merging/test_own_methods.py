"""Merge methods from outside the project: run from Python, from a config and from a recipe file, and checked first."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
import torch
from annotated_types import Gt
from safetensors import safe_open
from small_models import LAYER, read, tensors_of
from torch import Tensor

from sdft.errors import UserError
from sdft.formats.model_checkpoint import Checkpoint
from sdft.merging.__main__ import main
from sdft.merging.annotations import BlockFraction, PerInput, TaskVectors, Uniform, Weight, Weights
from sdft.merging.merge import merge
from sdft.merging.recipe import Step
from sdft.merging.statistics import Gram

WEIGHT = f"unet/{LAYER}.weight"


def larger(a: Weight, b: Weight, power: Annotated[float, Gt(0)], alpha: BlockFraction = 0.5) -> Weight:
    return torch.lerp(a, torch.maximum(a, b), alpha**power)


def scattered(base: Weight, models: TaskVectors, norms: Gram, noise: Uniform) -> Weight:
    kept = [delta * (noise(1, i, delta.shape) < 0.5) for i, delta in enumerate(models)]
    return base + sum(kept) * (float(norms[0, 0]) > 0)


def unmarked(a: Tensor, b: Weight) -> Weight:
    return a + b


def untyped(a: Weight, alpha=1.0) -> Weight:
    return a * alpha


def variadic(*models: Weight) -> Weight:
    return models[0]


def resultless(a: Weight) -> Tensor:
    return a


def without_inputs(alpha: float = 1.0) -> Weight:
    return torch.tensor(alpha)


def without_base(models: TaskVectors) -> Weight:
    return models[0]


def mispaired(models: Weights, shares: Annotated[list[float], PerInput("model")]) -> Weight:
    return models[0]


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_weight(*arguments: object) -> None:
        raise AssertionError("weights were read before the method was checked")

    monkeypatch.setattr(Checkpoint, "read", read_weight)


def run(method: Callable, inputs: dict, out: Path, numbers: dict | None = None) -> Path:
    list(merge({"mine": Step(method, inputs, numbers or {})}, str(out)))
    return out


def test_a_function_of_this_file_merges_from_python(model: Callable[..., Path], tmp_path: Path) -> None:
    inputs = {"a": str(model("a", 0)), "b": str(model("b", 1))}
    numbers = {"power": 2.0, "alpha": {"middle": 0.5, "rest": 1.0}}
    found = read(run(larger, inputs, tmp_path / "out.safetensors", numbers))
    a, b = tensors_of(0), tensors_of(1)
    for name, tensor in found.items():
        expected = torch.lerp(a[name], torch.maximum(a[name], b[name]), 0.25 if name == WEIGHT else 1.0)
        assert torch.allclose(tensor, expected, atol=1e-6), name
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        recipe = json.loads(file.metadata()["sdft.merge"])
    assert recipe["steps"]["mine"]["method"] == f"{__name__}.larger"


def test_statistics_and_random_numbers_may_have_any_argument_name(model: Callable[..., Path], tmp_path: Path) -> None:
    base, tuned = tensors_of(0), tensors_of(1)
    inputs = {"base": str(model("base", 0)), "models": [str(model("tuned", 1))]}
    change = read(run(scattered, inputs, tmp_path / "out"))[WEIGHT] - base[WEIGHT]
    kept = (change - (tuned[WEIGHT] - base[WEIGHT])).abs() < 1e-6
    assert 20 < int(kept.sum()) < 76  # of 96, half are kept
    assert torch.equal(change[~kept], torch.zeros_like(change[~kept]))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (unmarked, "unmarked: a is annotated as a plain Tensor; use Weight, Delta or TaskVector"),
        (untyped, "untyped: alpha has no annotation"),
        (variadic, "variadic: .*models.* is not supported"),
        (resultless, "resultless: its return annotation must be Weight or Delta"),
        (without_inputs, "without_inputs: takes no tensor"),
        (without_base, "without_base: takes task vectors, so it needs an argument base: Weight"),
        (mispaired, r"mispaired: PerInput\('model'\) does not name a list of inputs"),
        (torch.lerp, "is not a Python function"),
    ],
)
def test_a_function_that_breaks_the_contract_is_reported(method: Callable, message: str, no_reading: None) -> None:
    with pytest.raises(UserError, match=message):
        run(method, {"a": "nano"}, Path("never"))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({}, r"power is not set: larger needs it, power=\.\.\."),
        ({"power": 1.0, "alhpa": 0.5}, "alhpa: larger has no such number; it takes power, alpha"),
        ({"power": 1.0, "alpha": {"midle": 0.5}}, "alpha: there is no block 'midle'"),
    ],
)
def test_wrong_arguments_are_reported_before_reading(
    numbers: dict, message: str, model: Callable[..., Path], tmp_path: Path, no_reading: None
) -> None:
    inputs = {"a": str(model("a", 0)), "b": str(model("b", 1))}
    with pytest.raises(UserError, match=message):
        run(larger, inputs, tmp_path / "out", numbers)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs `python -m sdft.merging` with these overrides, this file being importable as `test_own_methods`."""
    monkeypatch.setitem(sys.modules, "test_own_methods", sys.modules[__name__])

    def run_main(*overrides: str) -> None:
        monkeypatch.setattr(sys, "argv", ["sdft.merging", *overrides])
        main()

    return run_main


def test_a_config_chooses_it_by_target(command: Callable, model: Callable[..., Path], tmp_path: Path) -> None:
    inputs = f"a={model('a', 0)}", f"b={model('b', 1)}", f"out={tmp_path / 'out'}"
    command(*inputs, "alpha=1.0", "method._target_=test_own_methods.larger", "+method.power=2")
    assert torch.equal(read(tmp_path / "out")[WEIGHT], torch.maximum(tensors_of(0)[WEIGHT], tensors_of(1)[WEIGHT]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+method.power=-1.0", "method.power=-1.0: must be greater than 0"),
        ("+method.pwer=2.0", "did you mean 'method.power'"),
        ("method._target_=test_own_methods.unmarked", "unmarked"),
        ("method._partial_=false", "error: method"),
    ],
)
def test_a_wrong_config_is_reported(
    override: str, message: str, command: Callable, tmp_path: Path, no_reading: None, capsys: pytest.CaptureFixture
) -> None:
    target = "method._target_=test_own_methods.larger"
    overrides = [override] if override.startswith("method._target_") else [target, override]
    with pytest.raises(SystemExit):
        command("a=nano", "b=nano", f"out={tmp_path / 'out'}", *overrides)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_file_names_it_by_module_and_function(
    command: Callable, model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    step = f"method: test_own_methods.larger, a: {model('a', 0)}, b: {model('b', 1)}, alpha: 1.0"
    recipe = tmp_path / "recipe.yaml"
    untrusted = "merge=recipe", f"file={recipe}", f"out={tmp_path / 'out'}"
    recipe.write_text(f"steps: {{mine: {{{step}, power: 1.0}}}}")
    with pytest.raises(SystemExit):
        command(*untrusted)
    assert "add trust=test_own_methods" in capsys.readouterr().err
    overrides = (*untrusted, "trust=test_own_methods")
    for wrong, message in {
        "power: -1.0": "mine.power=-1.0: must be greater than 0",
        "pwer: 1.0": "mine.pwer: test_own_methods.larger has no such argument; did you mean 'power'?",
    }.items():
        recipe.write_text(f"steps: {{mine: {{{step}, {wrong}}}}}")
        with pytest.raises(SystemExit):
            command(*overrides)
        assert message in capsys.readouterr().err
    recipe.write_text("steps: {mine: {method: test_own_methods.none}}")
    with pytest.raises(SystemExit):
        command(*overrides)
    assert "method=test_own_methods.none: cannot be imported" in capsys.readouterr().err
    recipe.write_text(f"steps: {{mine: {{{step}, power: 1.0}}}}")
    command(*overrides)
    assert torch.equal(read(tmp_path / "out")[WEIGHT], torch.maximum(tensors_of(0)[WEIGHT], tensors_of(1)[WEIGHT]))
