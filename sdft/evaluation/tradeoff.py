"""The trade-off of two metrics: the Pareto front of the subjects, and which subject to keep, with the reason.

Works on estimates and verdicts; images are not needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from sdft.evaluation.results import Estimate, MetricInfo, Tradeoff, Verdict
from sdft.evaluation.statistics import LEVEL

Estimates = Mapping[str, Mapping[str, Estimate]]
"""Subject -> metric -> estimate."""


def find_tradeoff(
    estimates: Estimates, x: MetricInfo, y: MetricInfo, verdicts: Sequence[Verdict], baseline: str
) -> Tradeoff | None:
    """The trade-off between keeping `x` and gaining `y`; None if fewer than two subjects have both metrics.

    Recommended is the subject of the Pareto front that gains most in y without a detectable loss in x against the
    baseline. If none gains without a loss, the best balance of the front: the largest sum of both metrics, each scaled
    to the range of the subjects.
    """
    points = {
        name: (_signed(own[x.name], x), _signed(own[y.name], y))
        for name, own in estimates.items()
        if x.name in own and y.name in own
    }
    if len(points) < 2 or baseline not in points:
        return None
    front = pareto_front(points)
    losers = {v.subject for v in verdicts if v.metric == x.name and v.p < LEVEL and _signed(v.difference, x) < 0}
    keepers = [name for name in front if name not in losers and points[name][1] > points[baseline][1]]
    describe = partial(_describe, estimates, x, y, baseline)
    if keepers:
        best = max(keepers, key=lambda name: points[name][1])
        return Tradeoff(x.name, y.name, front, best, f"{describe(best)}, {_loss(best, x, verdicts)}")
    if all(points[name][1] <= points[baseline][1] for name in points):
        return Tradeoff(x.name, y.name, front, baseline, f"{baseline}: no subject is better in {y.label}")
    balance = max(front, key=lambda name: sum(_share(points, name, i) for i in (0, 1)))
    reason = f"{describe(balance)}: the best balance, since every gain in {y.label} costs {x.label}"
    return Tradeoff(x.name, y.name, front, balance, reason)


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The points that no other dominates (is at least as high in both coordinates and higher in one)."""
    return [
        name
        for name, (x, y) in points.items()
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in points.values())
    ]


def _signed(estimate: Estimate, metric: MetricInfo) -> float:
    """The value, negated if lower is better."""
    return -estimate.value if metric.better == "lower" else estimate.value


def _describe(estimates: Estimates, x: MetricInfo, y: MetricInfo, baseline: str, name: str) -> str:
    """Both metrics of a subject, beside those of the baseline."""
    own, base = estimates[name], estimates[baseline]
    if name == baseline:
        return f"{name} ({y.label} {own[y.name].value:.3g}, {x.label} {own[x.name].value:.3g})"
    return (
        f"{name}: {y.label} {own[y.name].value:.3g} ({baseline} {base[y.name].value:.3g}), "
        f"{x.label} {own[x.name].value:.3g} ({baseline} {base[x.name].value:.3g})"
    )


def _loss(name: str, x: MetricInfo, verdicts: Sequence[Verdict]) -> str:
    """What the test says about a loss in `x`."""
    found = next((v for v in verdicts if v.subject == name and v.metric == x.name), None)
    if found is None:
        return f"the loss in {x.label} was not tested"
    if found.p < LEVEL:
        return f"and {x.label} is better too"
    if math.isinf(found.detectable):
        return f"but {found.num_pairs} pairs are too few to detect a loss in {x.label}"
    return f"with no detectable loss in {x.label}, where {found.detectable:.2g} would have been detected"


def _share(points: Mapping[str, tuple[float, float]], name: str, i: int) -> float:
    values = [point[i] for point in points.values()]
    return (points[name][i] - min(values)) / ((max(values) - min(values)) or 1.0)
