"""The verdicts of a comparison: how each subject differs from the baseline in one metric, as numbers and a sentence.

Pairs the values of images with the same axes; the test itself is in `statistics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sdft.evaluation.metrics.protocol import GeneratedImages
from sdft.evaluation.results import MetricInfo, Verdict
from sdft.evaluation.statistics import LEVEL, MIN_UNITS, Difference, compare, holm


def verdicts(
    info: MetricInfo,
    generated: Sequence[GeneratedImages],
    base: GeneratedImages,
    by_image: Mapping[str, Mapping[str, np.ndarray]],
) -> list[Verdict]:
    """Tests every subject against the baseline in one metric, over pairs of images with the same axes.

    A metric without values per image (one estimate for the set) is not tested. p-values are corrected by Holm's method.
    """
    others = [one for one in generated if one is not base and info.name in by_image[one.name]]
    if info.name not in by_image[base.name]:
        return []
    base_values = dict(zip((cell.pair for cell in base.cells), by_image[base.name][info.name], strict=True))
    found = []
    for one in others:
        partners = np.array([base_values.get(cell.pair, np.nan) for cell in one.cells])
        values = by_image[one.name][info.name]
        if difference := compare(values, partners, one.units, len(others)):
            found.append((one, difference, int((~np.isnan(values - partners)).sum())))
    ps = holm([difference.p for _, difference, _ in found]) if found else []
    return [
        Verdict(
            subject=one.name,
            baseline=base.name,
            metric=info.name,
            difference=d.difference,
            p=p,
            effect=d.effect,
            detectable=d.detectable,
            num_pairs=num_pairs,
            sentence=sentence(one, base.name, info, d, p, num_pairs),
        )
        for (one, d, num_pairs), p in zip(found, ps, strict=True)
    ]


def sentence(one: GeneratedImages, baseline: str, info: MetricInfo, d: Difference, p: float, num_pairs: int) -> str:
    """The result of a test as a sentence, with the number of pairs and prompts that it is based on."""
    num_prompts, pairs = len(set(one.prompts)), f"{num_pairs} pair{'s' if num_pairs > 1 else ''}"
    where = f"over {pairs} of {num_prompts} prompt{'s' if num_prompts > 1 else ''}"
    if d.num_units != num_prompts:
        where = f"{where}, which holds for these prompts only"
    if np.isinf(d.detectable):
        remedy = f"generate at least {MIN_UNITS} (seeds= or prompts=)"
        return f"{one.name}: {pairs} cannot show a difference in {info.label}; {remedy}."
    if d.detectable == 0 and d.difference.value == 0:
        return f"{one.name}: {info.label} is the same as {baseline}'s in all {pairs}."
    if p >= LEVEL:
        return (
            f"{one.name}: no detectable difference from {baseline} in {info.label} {where} (p = {p:.2g}); "
            f"a difference of {d.detectable:.2g} would have been detected."
        )
    direction = "higher" if d.difference.value > 0 else "lower"
    better = "" if info.better is None else ", which is better" if info.better == direction else ", which is worse"
    interval = ""
    if d.difference.low is not None and d.difference.high is not None:
        interval = f" (95 %: {d.difference.low:.2g} to {d.difference.high:.2g})"
    return (
        f"{one.name}: {info.label} is {abs(d.difference.value):.2g} {direction} than {baseline}'s{better}{interval}, "
        f"{where} (p = {p:.2g}, {abs(d.effect):.1f} standard deviations)."
    )
