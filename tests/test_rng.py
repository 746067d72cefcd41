"""A draw is a pure function of (run seed, purpose, key, visit)."""

from __future__ import annotations

import hashlib
from itertools import product

import pytest
import torch

from sdft.rng import Draws, generator, seed_of

KEYS, VISITS = ["cat.png", "dog.png", "shelf/cup.png"], [0, 4, 4]


def test_seed_is_the_documented_hash() -> None:
    digest = hashlib.blake2b(b"7\x1fnoise\x1fcat.png\x1f3", digest_size=8).digest()
    by_hand = int.from_bytes(digest, "little") >> 1
    assert seed_of(7, "noise", "cat.png", 3) == by_hand == 2714186634393198744


def test_seeds_fit_where_torch_takes_them() -> None:
    seeds = [seed_of(0, "noise", str(i)) for i in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert any(seed >= 2**62 for seed in seeds)  # the whole range is used


def test_each_part_of_the_position_gives_another_seed() -> None:
    positions = list(product((0, 1, 12), ("noise", "timestep"), ("", "a", "a1", "1"), (0, 1, 11)))
    assert len({seed_of(*position) for position in positions}) == len(positions)


def test_a_key_may_hold_any_character() -> None:
    assert seed_of(0, "noise", "собака/猫.png") != seed_of(0, "noise", "собака/犬.png")


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1], [2, 1]])
def test_draws_do_not_depend_on_the_rest_of_the_batch(order: list[int]) -> None:
    whole = Draws(5, KEYS, VISITS)
    part = Draws(5, [KEYS[i] for i in order], [VISITS[i] for i in order])
    assert torch.equal(part.normal("noise", (4, 3, 2)), whole.normal("noise", (4, 3, 2))[order])
    assert torch.equal(part.uniform("timestep"), whole.uniform("timestep")[order])


def test_draws_do_not_depend_on_earlier_draws() -> None:
    used, fresh = Draws(5, KEYS, VISITS), Draws(5, KEYS, VISITS)
    for _ in range(3):
        used.normal("posterior", (8,))
        used.uniform("timestep")
    assert torch.equal(used.normal("noise", (8,)), fresh.normal("noise", (8,)))


def test_global_batch_is_the_same_on_one_rank_and_on_two() -> None:
    keys, visits = [f"{i}" for i in range(4)], [0, 0, 1, 1]
    one = Draws(0, keys, visits).normal("noise", (2, 2))
    two = [Draws(0, keys[r * 2 : r * 2 + 2], visits[r * 2 : r * 2 + 2]).normal("noise", (2, 2)) for r in range(2)]
    assert torch.equal(one, torch.cat(two))


@pytest.mark.parametrize(
    ("seed", "purpose", "key", "visit"),
    [(6, "noise", "a", 0), (5, "blur", "a", 0), (5, "noise", "b", 0), (5, "noise", "a", 1)],
)
def test_another_position_draws_other_numbers(seed: int, purpose: str, key: str, visit: int) -> None:
    here, there = Draws(5, ["a"], [0]), Draws(seed, [key], [visit])
    assert not torch.equal(here.normal("noise", (16,)), there.normal(purpose, (16,)))
    assert here.uniform("noise") != there.uniform(purpose)


def test_torchs_own_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = Draws(5, KEYS, VISITS).normal("noise", (8,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(Draws(5, KEYS, VISITS).normal("noise", (8,)), first)


def test_shapes_and_types() -> None:
    draws = Draws(5, KEYS, VISITS)
    normal, uniform = draws.normal("noise", (4, 8, 8)), draws.uniform("timestep")
    assert (normal.shape, normal.dtype) == ((3, 4, 8, 8), torch.float32)
    assert (uniform.shape, uniform.dtype) == ((3,), torch.float64)


def test_successive_visits_draw_an_even_and_uncorrelated_stream() -> None:
    """4000 visits of one picture: mean 1/2 within 4 sigma (0.0046 each), no tie between neighbouring visits."""
    u = torch.stack(
        [torch.rand((), generator=generator(0, "timestep", "a", v), dtype=torch.float64) for v in range(4000)]
    )
    assert abs(u.mean() - 0.5) < 0.0183
    assert abs(u.var() - 1 / 12) < 0.005
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.064
    assert torch.histc(u, bins=10, min=0, max=1).min() > 320


def test_a_key_without_a_visit_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        Draws(0, ["a", "b"], [0]).uniform("timestep")
