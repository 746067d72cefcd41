"""Weights in bf16 learn, gradients are freed during the backward pass, and the bits do not depend on it."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdft.errors import UserError
from sdft.module import refuse_sharded
from sdft.optimizers import optimizers
from sdft.optimizers.optimizers import adamw, adamw_8bit, prodigy, schedule_free_adamw, sgd
from sdft.optimizers.parameterwise import ParameterwiseOptimizer, refuse_fused_backward, round_stochastically


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rounding_takes_one_of_the_two_neighbours_and_is_unbiased() -> None:
    step = 2**-7  # of bf16 between 1 and 2
    for share in (0.0, 0.25, 0.7):
        x = torch.full((40_000,), 1 + share * step)
        rounded = round_stochastically(x, noise())
        assert rounded.dtype == torch.bfloat16
        assert {*rounded.tolist()} <= {1.0, 1 + step}
        assert float((rounded.float() - 1).mean() / step) == pytest.approx(share, abs=0.01)
        assert torch.equal(round_stochastically(-x, noise()), -rounded)


def test_what_bf16_holds_exactly_stays_and_so_does_what_is_not_finite() -> None:
    x = torch.tensor([0.0, -0.5, 3.140625, float("inf"), float("-inf"), 1e-38, 3.38e38])
    assert torch.equal(round_stochastically(x, noise())[:5], x[:5].bfloat16())
    assert round_stochastically(torch.tensor([float("nan")]), noise()).isnan().all()
    strided = torch.randn(4, 6, 2, 2, generator=noise()).to(memory_format=torch.channels_last)
    assert round_stochastically(strided, noise()).is_contiguous(memory_format=torch.channels_last)


def test_small_updates_are_kept_that_plain_bf16_loses() -> None:
    """Each of 1000 steps moves weights of 1 by 1e-4, a fortieth of what bf16 resolves there."""
    plain, rounded = (nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2))
    build = partial(sgd, lr=1e-4, momentum=0.0)
    optimizers = [build([{"params": [plain]}]), ParameterwiseOptimizer(build, [{"params": [rounded]}], seed=0)]
    for _ in range(1000):
        for parameter, optimizer in zip((plain, rounded), optimizers, strict=True):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert float(plain.detach().float().mean()) == 1.0
    assert float(rounded.detach().float().mean()) == pytest.approx(0.9, abs=2e-3)
    assert rounded.dtype == torch.bfloat16


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
        self.to(dtype)

    def backward(self, number: int) -> None:
        x = torch.randn(8, 16, generator=noise(number)).to(self.layers[0].weight.dtype)
        (self.layers(x).float() - number).square().mean().backward()


def trained(build: Any, in_backward: bool | None, dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
    """Weights after five steps; `in_backward=None`: with the optimizer as it is."""
    net = Net(dtype)
    groups = [{"params": [*net.layers.parameters()]}]
    optimizer = (
        build(groups) if in_backward is None else ParameterwiseOptimizer(build, groups, 0, in_backward, **options)
    )
    for number in range(5):
        optimizer.step(partial(net.backward, number))
        optimizer.zero_grad()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("build", [adamw, adamw_8bit, sgd], ids=lambda build: build.__name__)
def test_one_at_a_time_or_in_the_backward_pass_gives_the_same_bits(build) -> None:
    build = partial(build, lr=1e-2, weight_decay=0.1)
    plain, single, fused = (trained(build, way) for way in (None, False, True))
    for a, b, c in zip(plain, single, fused, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_bf16_gives_the_same_bits_in_both_ways_and_other_seeds_other_ones() -> None:
    build = partial(adamw, lr=1e-2)
    after, fused = (trained(build, way, torch.bfloat16) for way in (False, True))
    exact = trained(build, None)
    for a, b, c in zip(after, fused, exact, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == torch.bfloat16
        assert not torch.equal(a, c.bfloat16())
        assert float((a.float() - c).abs().max()) < 0.05


def test_at_most_one_gradient_is_held() -> None:
    net, held = Net(), []
    optimizer = ParameterwiseOptimizer(partial(adamw, lr=1e-2), [{"params": [*net.parameters()]}], 0, in_backward=True)
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(p.grad is not None for p in net.parameters()))
        )
    optimizer.step(partial(net.backward, 1))
    assert held == [0] * len([*net.parameters()])  # the optimizer's own hooks came first, and freed each


def test_each_gradient_is_clipped_and_the_norm_of_all_is_known() -> None:
    net = Net()
    net.backward(1)
    sizes = [float(p.grad.norm()) for p in net.parameters()]
    limit = sorted(sizes)[2]
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = None
    build = partial(sgd, lr=1.0, momentum=0.0)
    optimizer = ParameterwiseOptimizer(build, [{"params": [*net.parameters()]}], 0, in_backward=True, max_norm=limit)
    optimizer.step(partial(net.backward, 1))
    steps = [float((p.detach() - old).norm()) for p, old in zip(net.parameters(), before, strict=True)]
    assert steps == pytest.approx([min(size, limit) for size in sizes], rel=1e-3)
    assert float(optimizer.gradient_norm()) == pytest.approx(sum(size**2 for size in sizes) ** 0.5, rel=1e-4)


def test_states_wider_than_the_weight_survive_a_checkpoint() -> None:
    """torch casts loaded states to the dtype of the weight."""
    net, again = Net(torch.bfloat16), Net(torch.bfloat16)
    first, second = (
        ParameterwiseOptimizer(partial(adamw, lr=1e-2), [{"params": [*one.parameters()]}], seed=0)
        for one in (net, again)
    )
    first.step(partial(net.backward, 1))
    second.load_state_dict(first.state_dict())
    states = [optimizer.state[one.layers[0].weight]["exp_avg"] for one, optimizer in ((net, first), (again, second))]
    assert states[1].dtype == torch.float32
    assert torch.equal(*states)
    assert second.param_groups[0]["num_updates"] == 1


@pytest.mark.parametrize("build", [partial(prodigy, lr=1.0), partial(schedule_free_adamw, lr=1e-3)])
def test_an_optimizer_that_needs_all_gradients_is_refused(build) -> None:
    with pytest.raises(UserError, match="needs all gradients, or the weights in fp32, at once"):
        ParameterwiseOptimizer(build, [{"params": [*Net().parameters()], "lr_scale": 1.0}], seed=0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"accumulate_grad_batches": 4}, "set it to 1, and data.batch_size higher"),
        ({"world_size": 2}, "several devices"),
        ({"precision": "16-mixed"}, "use bf16-mixed"),
    ],
)
def test_gradients_that_are_not_complete_are_refused(wrong: dict[str, Any], said: str) -> None:
    sound = {"accumulate_grad_batches": 1, "world_size": 1, "precision": "bf16-mixed"}
    refuse_fused_backward(SimpleNamespace(**sound))
    with pytest.raises(UserError, match=said):
        refuse_fused_backward(SimpleNamespace(**sound | wrong))


@pytest.mark.parametrize("name", ["adamw_8bit", "adafactor", "lion", "came", "prodigy", "schedule_free_adamw", "muon"])
def test_sharded_weights_are_left_to_torchs_own_optimizers(name: str) -> None:
    refuse_sharded(partial(adamw, lr=1e-3), parameterwise=False)
    refuse_sharded(partial(sgd, lr=1e-3), parameterwise=False)
    with pytest.raises(UserError, match="needs whole weights, or was not tested with sharded ones"):
        refuse_sharded(partial(getattr(optimizers, name), lr=1e-3), parameterwise=False)
    with pytest.raises(UserError, match="weights in bf16 are updated singly"):
        refuse_sharded(partial(adamw, lr=1e-3), parameterwise=True)
