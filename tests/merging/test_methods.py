"""Every method by hand on a few numbers, its identities, and a naive float64 reference."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np
import pytest
import torch
from torch import Tensor

from sdft.errors import UserError
from sdft.merging import methods, sparsify
from sdft.merging.annotations import Kind, signature_of
from sdft.merging.recipe import METHODS
from sdft.merging.statistics import gram, gram_of_differences, procrustes, thresholds


def t(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def uniform(seed: int, number: int, shape: Sequence[int]) -> Tensor:
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(100 * seed + number))


def chunks_of(tensors: list[Tensor], count: int):
    """The tensors as a method's statistics see them."""
    return lambda sample=None: zip(*(tensor[:sample].chunk(count) for tensor in tensors), strict=True)


def apply(name: str, *, pieces: int = 1, **arguments) -> Tensor:
    """A method on whole tensors, its statistics read in so many pieces."""
    signature = signature_of(METHODS[name])
    given = [arguments[key] for key in signature.inputs if key != "base"]
    flat = [tensor for one in given for tensor in (one if isinstance(one, list) else [one])]

    numbers = {key: value for key, value in arguments.items() if key in signature.numbers}
    statistics = {key: compute(chunks_of(flat, pieces), **numbers) for key, compute in signature.statistics.items()}
    random = {signature.uniform: uniform} if signature.uniform else {}
    return METHODS[name](**arguments, **statistics, **random)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_a_weighted_sum_are_the_inputs_bit_for_bit(dtype: torch.dtype) -> None:
    a = torch.tensor([-0.0, 1 / 3, 6e-8], dtype=dtype)
    b = torch.tensor([0.0, -0.0, -2 / 3], dtype=dtype)
    assert bits(methods.weighted_sum(a, b, 0.0)) == bits(a)
    assert bits(methods.weighted_sum(a, b, 1.0)) == bits(b)


def test_sums_by_hand() -> None:
    a, b, c = t(1, 2), t(3, 6), t(2, 8)
    assert methods.weighted_sum(a, b, 0.25).tolist() == [1.5, 3.0]
    assert methods.linear([a, b, c], [1, 1, 2]).tolist() == [2.0, 6.0]
    assert methods.linear([a, b]).tolist() == [2.0, 4.0]
    assert methods.difference(b, a).tolist() == [2.0, 4.0]
    assert methods.add(a, b, 0.5).tolist() == [2.5, 5.0]
    assert methods.sum_of([a, b], [1.0, -1.0]).tolist() == [-2.0, -4.0]
    assert methods.add_difference(a, b, c, 0.5).tolist() == [1.5, 1.0]


def test_fisher_by_hand() -> None:
    # The second number matters to the second model alone, the third to none.
    models, importances = [t(1, 1, 1), t(5, 5, 5)], [t(3, 0, 0), t(1, 2, 0)]
    assert apply("fisher", models=models, importances=importances, floor=0.0).tolist() == [2.0, 5.0, 3.0]
    # floor 1 adds the mean importance, 1: shares 2/6, 3/4 and 1/2 of the second.
    found = apply("fisher", models=models, importances=importances, floor=1.0).tolist()
    assert found == pytest.approx([1 + 4 * 2 / 6, 1 + 4 * 3 / 4, 3.0])
    assert apply("fisher", models=models, importances=[t(0, 0, 0)] * 2).tolist() == [3.0, 3.0, 3.0]


def test_train_difference_by_hand() -> None:
    # learned b - c = 2 and 2; a is 1 and 0 away from b: shares 1/3 and 0.
    assert methods.train_difference(t(2, 3), t(3, 3), t(1, 1), 3.0).tolist() == pytest.approx([4.0, 3.0])


def test_slerp_goes_along_the_arc() -> None:
    half = apply("slerp", a=t(1, 0), b=t(0, 1), alpha=0.5)
    assert half.tolist() == pytest.approx([sqrt(0.5)] * 2)
    third = apply("slerp", a=t(2, 0), b=t(0, 2), alpha=1 / 3)
    assert third.tolist() == pytest.approx([sqrt(3), 1.0])


def test_ties_by_hand() -> None:
    # The two largest of four are kept; the sum elects +, - and +; each mean is of those that agree.
    deltas = [t(4, -1, 3, 0.5), t(-2, -6, 1, 0.5)]
    merged = apply("ties", base=t(1, 1, 1, 1), models=deltas, density=0.5, alpha=1.0)
    assert merged.tolist() == [5.0, -5.0, 4.0, 1.0]


def test_dare_keeps_and_rescales_by_hand() -> None:
    drawn = uniform(7, 0, (4,))
    expected = [1 + (2 / 0.5 if chance < 0.5 else 0.0) for chance in drawn.tolist()]
    assert apply("dare", base=t(1, 1, 1, 1), models=[t(2, 2, 2, 2)], density=0.5, seed=7).tolist() == expected
    assert len(set(expected)) == 2


def test_dare_is_right_on_average() -> None:
    delta = torch.ones(200_000)
    kept = apply("dare", base=torch.zeros(200_000), models=[delta, -delta * 3], density=0.3, seed=1)
    assert kept.mean().item() == pytest.approx(-1.0, abs=0.02)


def test_della_keeps_larger_numbers_more_often() -> None:
    assert sparsify.ranks(torch.tensor([[3.0, -1, 2], [0, 5, -4]])).tolist() == [[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]]
    delta = torch.arange(1.0, 1001).repeat(200, 1)
    kept = apply("della", base=torch.zeros_like(delta), models=[delta], density=0.5, window=0.4, seed=3) != 0
    assert kept[:, :100].float().mean().item() == pytest.approx(0.32, abs=0.02)
    assert kept[:, -100:].float().mean().item() == pytest.approx(0.68, abs=0.02)
    with pytest.raises(UserError, match=r"window=0\.2: density=0\.95"):
        apply("della", base=delta, models=[delta], density=0.95)


def test_model_stock_by_hand() -> None:
    # cos 0 between them: the base stands; cos 1: their mean.
    assert apply("model_stock", base=t(1, 1), models=[t(2, 0), t(0, 4)]).tolist() == [1.0, 1.0]
    assert apply("model_stock", base=t(1, 1), models=[t(2, 2), t(4, 4)]).tolist() == pytest.approx([4.0, 4.0])
    # cos 0.5: t = 2 x 0.5 / 1.5
    assert apply("model_stock", base=t(0, 0), models=[t(2, 0), t(1, sqrt(3))]).tolist() == pytest.approx(
        [1.0, sqrt(3) / 3]
    )


def test_the_geometric_median_by_hand() -> None:
    # Of three points on a line it is the middle one; of an obtuse triangle (> 120 degrees) that corner.
    assert apply("geometric_median", models=[t(0.0), t(1.0), t(10.0)]).tolist() == pytest.approx([1.0], abs=1e-2)
    corner = apply("geometric_median", models=[t(0, 0), t(10, 1), t(-10, 1)])
    assert corner.tolist() == pytest.approx([0.0, 0.0], abs=0.05)
    # Of an equilateral one it is the centre.
    centre = apply("geometric_median", models=[t(0, 0), t(2, 0), t(1, sqrt(3))])
    assert centre.tolist() == pytest.approx([1.0, sqrt(3) / 3])


def test_cosine_adaptive_by_hand() -> None:
    agree = apply("cosine_adaptive", base=t(1, 1), a=t(1, 0), b=t(3, 0), alpha=0.5)
    assert agree.tolist() == [2.0, 1.0]
    strange = apply("cosine_adaptive", base=t(1, 1), a=t(1, 0), b=t(0, 3), alpha=0.5)
    assert strange.tolist() == [1.5, 2.5]


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (6, 4, 3, 3), (7, 7)])
def test_rotate_finds_a_turn_of_the_input_channels(shape: tuple[int, ...]) -> None:
    a, channels = random(0, *shape), shape[1]
    q = torch.linalg.qr(random(1, channels, channels)).Q
    turned = torch.einsum("oi...,ij->oj...", a, q)
    for pieces in (1, 3):
        back = apply("rotate", a=a, b=turned, alpha=0.5, pieces=pieces)
        assert torch.allclose(back, a, atol=1e-4)


def test_rotate_leaves_vectors() -> None:
    assert apply("rotate", a=t(1, 2), b=t(3, 6), alpha=0.25).tolist() == [1.5, 3.0]


def test_clamp_by_hand() -> None:
    assert methods.clamp(t(-5, 1.5, 9), [t(1, 2, 3), t(-1, 1, 4)]).tolist() == [-1.0, 1.5, 4.0]


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("weighted_sum", {"alpha": 0.3}),
        ("slerp", {"alpha": 0.3}),
        ("rotate", {"alpha": 0.3}),
        ("linear", {"shares": [0.3, 1.7]}),
        ("fisher", {"importances": [random(2, 20, 10).abs(), random(3, 20, 10).abs()]}),
        ("geometric_median", {}),
        ("model_stock", {}),
        ("ties", {"density": 1.0}),
        ("cosine_adaptive", {}),
        ("clamp", {}),
    ],
)
def test_merging_x_with_x_is_x(name: str, inputs: dict) -> None:
    x, base = random(0, 20, 10), random(1, 20, 10)
    signature, given = signature_of(METHODS[name]), {}
    for key, wanted in signature.inputs.items():
        if wanted.kind == Kind.IMPORTANCE:
            continue
        tensor = x - base if wanted.kind == Kind.TASK_VECTOR else x
        given[key] = base if key == "base" else [tensor, tensor.clone()] if wanted.is_list else tensor.clone()
    merged = apply(name, **given, **inputs)
    exact = name in ("weighted_sum", "slerp", "linear", "fisher", "geometric_median", "clamp")
    assert torch.equal(merged, x) if exact else torch.allclose(merged, x, atol=1e-5)


def test_more_identities() -> None:
    a, b, base = (random(seed, 30, 8) for seed in (0, 1, 2))
    assert torch.equal(methods.add_difference(a, b, b.clone(), 0.7), a)
    assert torch.equal(methods.train_difference(a, b, b.clone(), 0.7), a)
    assert torch.equal(apply("slerp", a=a, b=b, alpha=0.0), a)
    assert torch.equal(apply("slerp", a=a, b=b, alpha=1.0), b)
    # In numbers of a file, fp16, TIES of one model is that model to the bit.
    half, ground = a.half().float(), base.half().float()
    one = apply("ties", base=ground, models=[half - ground], density=1.0)
    assert torch.equal(one.half(), half.half())


@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("pieces", [1, 4])
def test_thresholds_are_the_exact_order_statistic(density: float, pieces: int) -> None:
    x, y = random(0, 400, 5), (random(1, 400, 5) * 3).round()
    found = thresholds(chunks_of([x, y], pieces), density=density)
    for tensor, threshold in zip((x, y), found, strict=True):
        magnitudes = np.sort(tensor.abs().numpy().ravel())[::-1]
        expected = 0.0 if density == 1.0 else magnitudes[round(density * 2000) - 1]
        assert threshold == expected


@pytest.mark.parametrize("first_rows", [0.001, 1000.0])
def test_thresholds_are_exact_where_a_sample_misleads(first_rows: float) -> None:
    x = random(0, 400, 5)
    x[:8] *= first_rows
    found = thresholds(lambda sample=None: iter([(x[:8] if sample else x,)]), density=0.3)
    assert found == [float(x.abs().flatten().sort(descending=True).values[599])]


def test_thresholds_of_what_is_no_number_come_to_an_end() -> None:
    for odd in (float("nan"), float("inf")):
        full = torch.full((5, 4), odd)
        assert len(thresholds(chunks_of([full], 1), density=0.5)) == 1


def test_statistics_do_not_depend_on_the_pieces() -> None:
    tensors = [random(seed, 64, 9) for seed in range(3)]
    whole = torch.stack([tensor.double().flatten() for tensor in tensors])
    for pieces in (1, 5):
        found = gram(chunks_of(tensors, pieces))
        assert torch.allclose(found, whole @ whole.T, rtol=1e-5, atol=1e-4)
        found = gram_of_differences(chunks_of(tensors, pieces))
        moved = whole - whole[0]
        assert torch.allclose(found, moved @ moved.T, rtol=1e-5, atol=1e-4)


def test_a_turn_is_orthogonal_and_no_other_comes_nearer() -> None:
    a, b = random(0, 40, 6), random(1, 40, 6)
    factors = procrustes(lambda: iter([(a, b)]))
    assert factors is not None
    q = factors[0] @ factors[1]
    assert torch.allclose(q.T @ q, torch.eye(6), atol=1e-5)
    u, _, v = np.linalg.svd((b.T @ a).double().numpy())
    assert np.allclose(q.numpy(), u @ v, atol=1e-4)


def test_every_method_annotates_its_arguments_and_result() -> None:
    assert signature_of(methods.add).inputs["delta"].kind == Kind.DELTA
    assert signature_of(methods.difference).result == Kind.DELTA
    assert all(signature_of(method).inputs for method in METHODS.values())
    changes = [m for m in METHODS.values() if any(i.kind == Kind.TASK_VECTOR for i in signature_of(m).inputs.values())]
    assert changes
    assert all("base" in signature_of(method).inputs for method in changes)
