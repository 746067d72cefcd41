"""Estimates with intervals and paired tests: difference, p-value, effect size and smallest detectable difference.

Images of one prompt are correlated, so they do not count as independent observations. The independent unit is the
prompt with all its images if there are at least `MIN_UNITS` prompts: the test then holds for prompts of that kind.
With fewer prompts it is the pair (prompt, seed), and the test holds for these prompts only.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

from sdft.evaluation.results import Estimate
from sdft.rng import seed_of

MIN_UNITS = 6
"""The fewest units with which a sign-flip test can reach 5 %: 2 of the 2^6 patterns of signs are 3 %."""
LEVEL, POWER = 0.05, 0.8
"""Significance level of the tests, and power at which a difference counts as detectable."""
RESAMPLES = 4999


@dataclass(frozen=True)
class Difference:
    """The test of paired units.

    difference: a minus b. p: two-sided. effect: the difference in standard deviations of the paired differences.
    detectable: the smallest difference that this number of units can detect; infinite with too few units.
    """

    difference: Estimate
    p: float
    effect: float
    detectable: float
    num_units: int


def units(prompts: Sequence[str], seeds: Sequence[int]) -> list[Hashable]:
    """The unit of each image: its prompt, or its prompt and seed; see the module docstring."""
    if len(set(prompts)) >= MIN_UNITS:
        return list(prompts)
    return list(zip(prompts, seeds, strict=True))


def unit_means(values: np.ndarray, of: Sequence[Hashable]) -> np.ndarray:
    """Mean of each unit, in order of first appearance. NaN is left out, and so are units that have only NaN."""
    number = {unit: i for i, unit in enumerate(dict.fromkeys(of))}
    index = np.array([number[unit] for unit in of])
    valid = ~np.isnan(values)
    counts = np.bincount(index[valid], minlength=len(number))
    sums = np.bincount(index[valid], values[valid], minlength=len(number))
    return sums[counts > 0] / counts[counts > 0]


def estimate(values: np.ndarray, of: Sequence[Hashable]) -> Estimate | None:
    """The mean over units with its 95 % bootstrap interval; None if there are only NaN."""
    means = unit_means(np.asarray(values, dtype=float), of)
    return _with_interval(means) if len(means) else None


def compare(a: np.ndarray, b: np.ndarray, of: Sequence[Hashable], num_comparisons: int = 1) -> Difference | None:
    """Tests the paired values of two subjects with a two-sided sign-flip test; None without a pair.

    num_comparisons: by which the level is divided for the smallest detectable difference.
    """
    d = unit_means(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), of)
    n = len(d)
    if n == 0:
        return None
    spread = float(d.std(ddof=1)) if n > 1 else 0.0
    effect = float(d.mean() / spread) if spread > 0 else 0.0
    return Difference(_with_interval(d), sign_flip(d), effect, detectable(spread, n, num_comparisons), n)


def sign_flip(d: np.ndarray) -> float:
    """p-value of the mean of `d` being 0, over all patterns of signs or 4999 random ones; 1 with too few units.

    Equals `scipy.stats.permutation_test`, which takes a thousand times as long over all patterns.
    """
    if len(d) < MIN_UNITS or not np.any(d):
        return 1.0
    sums = np.abs(_signs(len(d)) @ d)
    # At least as large as the observed sum, which the first pattern gives; the tolerance is for rounding.
    return float(np.mean(sums >= sums[0] * (1 - 1e-12)))


def detectable(spread: float, n: int, num_comparisons: int = 1) -> float:
    """The smallest difference that `n` units detect with 80 % power at the 5 % level, divided by `num_comparisons`.

    (t_{1 - a/2} + t_{80 %}) spread / sqrt(n), from Student's t with n - 1 degrees of freedom; infinite for small n.
    spread: standard deviation of the differences.
    """
    if n < MIN_UNITS:
        return float("inf")
    t = stats.t(n - 1)
    return float((t.ppf(1 - LEVEL / num_comparisons / 2) + t.ppf(POWER)) * spread / np.sqrt(n))


def needed_units(effect: float, num_comparisons: int = 1) -> float | None:
    """Units with which a difference would be detected with 80 % power, as by `detectable`; None if there is none.

    effect: the difference in standard deviations of the differences, 0 or more.
    """
    if effect == 0:
        return None
    needed = (stats.norm.ppf(1 - LEVEL / max(num_comparisons, 1) / 2) + stats.norm.ppf(POWER)) / effect
    return float(max(needed**2 + 2, MIN_UNITS))  # Student's t needs about two more than the normal


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for multiple tests (Holm 1979): the k-th smallest of m times m - k + 1, never decreasing."""
    order = np.argsort(ps)
    stepped = np.asarray(ps)[order] * np.arange(len(ps), 0, -1)
    corrected = np.empty(len(ps))
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return corrected.tolist()


def jackknife(statistic: Callable[[np.ndarray], float], of: Sequence[Hashable], max_groups: int = 20) -> Estimate:
    """The value of a whole set with its 95 % jackknife interval, by leaving out one unit at a time.

    A bootstrap would draw members twice, which distances between sets see as nearest neighbours.

    statistic: the value of the members with these indices. of: the unit of each member.
    max_groups: with more units, groups of units are left out. No interval with fewer than 3 units.
    """
    value = statistic(np.arange(len(of)))
    pseudo = pseudo_values(statistic, of, max_groups)
    g = len(pseudo)
    if g < 3:
        return Estimate(value)
    error = pseudo.std(ddof=1) / np.sqrt(g)
    half_width = float(stats.t(g - 1).ppf(1 - LEVEL / 2) * error)
    return Estimate(value, value - half_width, value + half_width)


def pseudo_values(
    statistic: Callable[[np.ndarray], float], of: Sequence[Hashable], max_groups: int = 20
) -> np.ndarray:
    """One value for each unit (or group of units), G, that stands for its share in the value of a whole set (Tukey).

    With G groups it is G s - (G - 1) s_i, where s_i is the value without the group i. Their mean is the value of the
    set without its bias of first order, and their differences between two sets can be tested like those of images.
    """
    number = {unit: i for i, unit in enumerate(dict.fromkeys(of))}
    groups = np.array([number[unit] for unit in of]) % max_groups
    g = min(len(number), max_groups)
    if g < 2:
        return np.array([statistic(np.arange(len(of)))])
    left_out = np.array([statistic(np.flatnonzero(groups != i)) for i in range(g)])
    return g * statistic(np.arange(len(of))) - (g - 1) * left_out


@lru_cache
def _signs(n: int) -> np.ndarray:
    """Patterns of signs, P x n: all of them for n up to 12, else random ones; the first is all positive."""
    if n <= 12:
        return 1.0 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    random = _rng("signs").choice([-1.0, 1.0], (RESAMPLES, n))
    return np.concatenate([np.ones((1, n)), random])


def _with_interval(means: np.ndarray) -> Estimate:
    """The mean and its bias-corrected accelerated bootstrap interval (Efron 1987)."""
    value = float(means.mean())
    if len(means) < 3:
        return Estimate(value)
    if np.ptp(means) <= 1e-9 * max(1.0, abs(value)):
        return Estimate(value, value, value)
    found = stats.bootstrap((means,), np.mean, n_resamples=1999, vectorized=True, rng=_rng("bootstrap"))
    return Estimate(value, float(found.confidence_interval.low), float(found.confidence_interval.high))


def _rng(purpose: str) -> np.random.Generator:
    """A generator that depends on the purpose alone, so that results are reproducible."""
    return np.random.default_rng(seed_of(0, purpose))
