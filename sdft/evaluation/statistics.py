"""Is it different, by how much, and what could have been seen? Estimates and paired comparisons, by scipy.

Pictures of one prompt resemble each other, so they are not as many independent witnesses. What counts as one is a
unit: a prompt with all its pictures where there are enough prompts, which speaks of prompts of this kind; a pair of
(prompt, seed) where there are few, which speaks of these prompts only. Knows numbers. Must not know pictures.
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
"""Units from which a sign-flip test can reach 5 %: 2 of the 2^6 patterns of signs are 3 %."""
LEVEL, POWER = 0.05, 0.8
RESAMPLES = 4999


@dataclass(frozen=True)
class Difference:
    """Of paired units. `difference` is a minus b; `effect` is it in standard deviations of the differences."""

    difference: Estimate
    p: float
    effect: float
    detectable: float
    num_units: int


def units(prompts: Sequence[str], seeds: Sequence[int]) -> list[Hashable]:
    """The unit of each picture."""
    if len(set(prompts)) >= MIN_UNITS:
        return list(prompts)
    return list(zip(prompts, seeds, strict=True))


def unit_means(values: np.ndarray, of: Sequence[Hashable]) -> np.ndarray:
    """Mean of each unit, in the order of their first appearance; NaN is left out, and units of nothing else."""
    number = {unit: i for i, unit in enumerate(dict.fromkeys(of))}
    index = np.array([number[unit] for unit in of])
    there = ~np.isnan(values)
    counts = np.bincount(index[there], minlength=len(number))
    sums = np.bincount(index[there], values[there], minlength=len(number))
    return sums[counts > 0] / counts[counts > 0]


def estimate(values: np.ndarray, of: Sequence[Hashable]) -> Estimate | None:
    """The mean over units with its 95 % bootstrap interval; none where nothing was measured."""
    means = unit_means(np.asarray(values, dtype=float), of)
    return _with_interval(means) if len(means) else None


def compare(a: np.ndarray, b: np.ndarray, of: Sequence[Hashable], num_comparisons: int = 1) -> Difference | None:
    """Paired values of two subjects; none without a pair.

    p: of a two-sided sign-flip test: without a difference, a unit would as likely point the other way.
    num_comparisons: among which the level is shared, for the smallest difference that could have been seen.
    """
    d = unit_means(np.asarray(a, dtype=float) - np.asarray(b, dtype=float), of)
    n = len(d)
    if n == 0:
        return None
    spread = float(d.std(ddof=1)) if n > 1 else 0.0
    effect = float(d.mean() / spread) if spread > 0 else 0.0
    return Difference(_with_interval(d), sign_flip(d), effect, detectable(spread, n, num_comparisons), n)


def sign_flip(d: np.ndarray) -> float:
    """p of the mean of `d` being 0, over all patterns of signs or 4999 random ones; 1 with too few to tell.

    The same as scipy's `permutation_test`, which takes a thousand times as long over all patterns.
    """
    if len(d) < MIN_UNITS or not np.any(d):
        return 1.0
    sums = np.abs(_signs(len(d)) @ d)
    # As large as the one that was seen, rounding aside; the first pattern is the one that was seen.
    return float(np.mean(sums >= sums[0] * (1 - 1e-12)))


def detectable(spread: float, n: int, num_comparisons: int = 1) -> float:
    """The smallest difference that `n` units of this spread show with 80 % power at the 5 % level, shared by Holm.

    (t_{1 - a/2} + t_{80 %}) spread / sqrt(n), by Student's t with n - 1 degrees; infinite where n is too small.
    """
    if n < MIN_UNITS:
        return float("inf")
    t = stats.t(n - 1)
    return float((t.ppf(1 - LEVEL / num_comparisons / 2) + t.ppf(POWER)) * spread / np.sqrt(n))


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979): the k-th smallest of m, times m - k + 1, never decreasing."""
    order = np.argsort(ps)
    stepped = np.asarray(ps)[order] * np.arange(len(ps), 0, -1)
    corrected = np.empty(len(ps))
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return corrected.tolist()


def jackknife(statistic: Callable[[np.ndarray], float], of: Sequence[Hashable], most: int = 20) -> Estimate:
    """A figure of a whole set, given which members count, with its 95 % interval by leaving out one unit at a time.

    Sets are not resampled: doubled members would look like neighbours. Beyond `most` units, groups of them are left
    out. No interval with fewer than 3.
    """
    number = {unit: i for i, unit in enumerate(dict.fromkeys(of))}
    groups = np.array([number[unit] for unit in of]) % most
    value = statistic(np.arange(len(of)))
    g = min(len(number), most)
    if g < 3:
        return Estimate(value)
    left = np.array([statistic(np.flatnonzero(groups != i)) for i in range(g)])
    error = np.sqrt((g - 1) / g * np.square(left - left.mean()).sum())
    reach = float(stats.t(g - 1).ppf(1 - LEVEL / 2) * error)
    return Estimate(value, value - reach, value + reach)


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
    """The same draws for the same question, every time it is asked."""
    return np.random.default_rng(seed_of(0, purpose))
