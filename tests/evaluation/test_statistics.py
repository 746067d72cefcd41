"""Verdicts: few false positives, enough power, and agreement with scipy and with hand-worked numbers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sdft.evaluation.statistics import LEVEL, compare, detectable, estimate, holm, jackknife, sign_flip, units

PROMPTS, SEEDS = 12, 4


def paired(rng: np.random.Generator, shift: float = 0.0, shift_spread: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Two subjects on the same prompts, each under different seeds."""
    prompt = rng.normal(0, 1, (PROMPTS, 1))
    a, b = (prompt + rng.normal(0, 0.5, (PROMPTS, SEEDS)) for _ in range(2))
    return (a + shift + rng.normal(0, shift_spread, (PROMPTS, 1))).ravel(), b.ravel()


OF = units([f"prompt {i}" for i in range(PROMPTS) for _ in range(SEEDS)], list(range(SEEDS)) * PROMPTS)


@pytest.mark.parametrize(("num_subjects", "most"), [(1, 50), (3, 64)])
def test_a_subject_against_itself_under_other_seeds_is_different_in_at_most_5_percent(num_subjects, most) -> None:
    """Of 1000 comparisons; of three subjects, Holm-corrected, any wrong one counts.

    The true rate is just below 5 % in both cases, so the count scatters around 49 by 7; 64 is two deviations above.
    """
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(1000):
        ps = []
        for _ in range(num_subjects):
            a, b = paired(rng)
            ps.append(sign_flip(a.reshape(PROMPTS, SEEDS).mean(1) - b.reshape(PROMPTS, SEEDS).mean(1)))
        wrong += min(holm(ps)) < LEVEL
    assert wrong <= most


def test_prompts_that_differ_in_their_shift_do_not_pass_for_many_witnesses() -> None:
    """A subject that is better on some prompts and worse on others: pairs as units would see 48 witnesses, not 12."""
    rng, by_unit, by_pair = np.random.default_rng(2), 0, 0
    for _ in range(300):
        a, b = paired(rng, shift_spread=1.0)
        by_unit += compare(a, b, OF).p < LEVEL
        by_pair += sign_flip(a - b) < LEVEL
    assert by_unit <= 0.08 * 300
    assert by_pair > 0.15 * 300


def test_a_planted_effect_is_found() -> None:
    """0.4, which is 0.8 of the standard deviation over seeds: the difference of unit means has a spread of 0.35."""
    rng, found = np.random.default_rng(3), 0
    for _ in range(200):
        a, b = paired(rng, shift=0.4)
        found += compare(a, b, OF).p < LEVEL
    assert found >= 0.9 * 200


def test_the_detectable_difference_is_what_is_detected_in_four_cases_of_five() -> None:
    rng, spread = np.random.default_rng(4), 0.5 * np.sqrt(2 / SEEDS)
    shift = detectable(spread, PROMPTS)
    found = sum(compare(*paired(rng, shift=shift), OF).p < LEVEL for _ in range(200))
    assert 0.7 < found / 200 < 0.9
    assert detectable(spread, PROMPTS, 4) > shift
    assert detectable(spread, 5) == np.inf


def test_intervals_cover_the_truth() -> None:
    rng, covered = np.random.default_rng(5), 0
    for _ in range(100):
        a, b = paired(rng, shift=0.3)
        difference = compare(a, b, OF).difference
        covered += difference.low <= 0.3 <= difference.high
    assert 84 <= covered <= 100


def test_a_difference_by_hand() -> None:
    """Differences 1 ... 6: all signs alike happens twice in 64, so p = 2/64; mean 3.5, deviation sqrt(3.5)."""
    b = np.zeros(6)
    found = compare(np.arange(1.0, 7.0), b, list("abcdef"))
    assert found.p == pytest.approx(2 / 64)
    assert found.difference.value == 3.5
    assert found.effect == pytest.approx(3.5 / np.sqrt(3.5))
    uneven = np.array([0.3, -0.1, 0.8, 0.2, 0.5, -0.4, 0.9])
    independent = stats.permutation_test((uneven,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(uneven) == pytest.approx(independent.pvalue)
    many = np.random.default_rng(0).normal(0.3, 1, 40)
    assert sign_flip(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.02)


def test_too_few_pairs_have_no_test() -> None:
    found = compare(np.ones(5), np.zeros(5), list("abcde"))
    assert (found.p, found.detectable) == (1.0, np.inf)
    assert compare(np.array([np.nan]), np.zeros(1), ["a"]) is None
    assert sign_flip(np.zeros(8)) == 1.0


def test_units_are_prompts_where_there_are_enough() -> None:
    assert units(["a"] * 4, [0, 1, 2, 3]) == [("a", 0), ("a", 1), ("a", 2), ("a", 3)]
    assert units(list("abcdef") * 2, [0] * 6 + [1] * 6) == list("abcdef") * 2


def test_a_mean_weighs_units_alike_and_leaves_out_what_is_not_there() -> None:
    found = estimate(np.array([1.0, 3.0, np.nan, 8.0]), ["a", "a", "b", "c"])
    assert found.value == (2 + 8) / 2
    assert estimate(np.array([np.nan]), ["a"]) is None


def test_holm_by_hand() -> None:
    """0.01 x 3, 0.02 x 2, 0.04 x 1, and never below a smaller one; with Bonferroni the last two would be 0.06, 0.12."""
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_jackknife_of_a_mean_is_the_t_interval() -> None:
    values = np.random.default_rng(6).normal(size=10)
    found = jackknife(lambda rows: float(values[rows].mean()), list(range(10)))
    low, high = stats.t.interval(0.95, 9, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert jackknife(lambda rows: 1.0, ["a", "b"]).low is None
