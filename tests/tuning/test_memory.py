"""Copies of weights that are not kept twice: initial weights in half precision, averages swapped in place."""

from __future__ import annotations

import pytest
import torch

from sdft.evaluation.subject_loader import SubjectLoader
from sdft.evaluation.subjects import Subject
from sdft.tuning.full import Full, narrowest
from sdft.tuning.parameters import swap_parameters, trainable_parameters


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(0.333251953125, torch.float16), (1e-7, torch.float32), (2.0**100, torch.bfloat16), (0.1, torch.float32)],
)
def test_initial_weights_take_the_narrowest_dtype_that_is_exact(value: float, dtype: torch.dtype) -> None:
    weight = torch.tensor([1.0, value])
    kept = narrowest(weight)
    assert kept.dtype == dtype
    assert torch.equal(kept.float(), weight)
    assert kept.data_ptr() != weight.data_ptr()


def test_the_base_of_weights_from_a_half_precision_file_comes_back_exactly(tiny_model) -> None:
    model = tiny_model()
    for p in model.parameters():
        p.data = p.data.half().float()
    tuning = Full(["unet"])
    tuning.attach(model)
    assert {kept.dtype for kept in tuning.initial.values()} == {torch.float16}
    before = {name: p.detach().clone() for name, p in trainable_parameters(model)}
    with torch.no_grad():
        for _, p in trainable_parameters(model):
            p.add_(0.1)
    tuned = {name: p.detach().clone() for name, p in trainable_parameters(model)}
    with tuning.base(model):
        assert all(torch.equal(p, before[name]) for name, p in trainable_parameters(model))
    assert all(torch.equal(p, tuned[name]) for name, p in trainable_parameters(model))


def test_two_swaps_leave_everything_as_it_was(tiny_model) -> None:
    model = tiny_model()
    Full(["unet"]).attach(model)
    live = {name: p.detach().clone() for name, p in trainable_parameters(model)}
    average = {name: p.detach() + 1 for name, p in trainable_parameters(model)}
    kept, places = {name: value.clone() for name, value in average.items()}, [v.data_ptr() for v in average.values()]
    swap_parameters(model, average)
    assert all(torch.equal(p, kept[name]) for name, p in trainable_parameters(model))
    assert all(torch.equal(average[name], value) for name, value in live.items())
    swap_parameters(model, average)
    assert all(torch.equal(p, live[name]) for name, p in trainable_parameters(model))
    assert all(torch.equal(average[name], value) for name, value in kept.items())
    assert [value.data_ptr() for value in average.values()] == places


@pytest.mark.parametrize("small", [True, False])
def test_a_comparison_holds_one_large_model_at_a_time(small: bool, tiny_model, monkeypatch) -> None:
    held: list[str] = []

    class Counted:
        def __init__(self, name: str):
            self.name, self.model = name, tiny_model()
            held.append(name)

        def __del__(self) -> None:
            held.remove(self.name)

        def to(self, _):
            return self

        def eval(self):
            return self

        def parameters(self):
            return self.model.parameters()

    most = []

    def load(weights: str = "base"):
        loaded = Counted(weights)
        most.append(len(held))
        return loaded

    monkeypatch.setattr("sdft.evaluation.subject_loader.SMALL", 2**30 if small else 1)
    loader = SubjectLoader(load, "base", torch.device("cpu"))
    for weights in ("base", "merged", "base", "other"):
        with loader.open(Subject(weights, weights, weights=weights)) as model:
            assert model.name == weights
        del model
    assert max(most) == (2 if small else 1)
    assert len(most) == (3 if small else 4), "a large base is loaded again"
