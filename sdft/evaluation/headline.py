"""The result of a comparison in one sentence, as a person would say it, from its estimates and tests.

A metric of single images has a test (`verdicts`). One of a whole set has none: two of its estimates count as different
if they are further apart than the root of the sum of the squares of their 95 % intervals' halves, the 5 % level for
independent estimates; images of the same prompts and seeds are alike, so that fewer than 5 % would be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from scipy import stats

from sdft.evaluation.results import Estimate, Headline, MetricInfo, Results
from sdft.evaluation.statistics import LEVEL, MIN_UNITS, needed_units

Kind = Literal["better", "worse", "same", "unknown"]
MOST_DRAWN = 1000
"""Prompts or seeds: where more would be needed, the difference is called small instead."""
MOST_NAMED = 3


class Words(NamedTuple):
    """How a subject is called that is better, worse or alike in a metric, and the best of several."""

    better: str
    worse: str
    same: str
    best: str


LOOK = Words("closer to the look", "further from the look", "as close to the look", "closest to the look")
SAID = {
    **dict.fromkeys(("style_distance", "style_gain", "clip_i", "cmmd", "kid", "fid"), LOOK),
    "adherence": Words(
        "more faithful to the prompts", "less faithful to the prompts", "as faithful to the prompts",
        "most faithful to the prompts",
    ),
    "diversity": Words("more varied", "less varied", "as varied", "most varied"),
    "novelty": Words(
        "further from the training images", "closer to the training images", "as far from the training images",
        "furthest from the training images",
    ),
}  # fmt: skip


class Relation(NamedTuple):
    """How a subject stands to another in a metric. units: independent observations that would tell; None if unknown."""

    kind: Kind
    units: float | None = None


@dataclass(frozen=True)
class Compared:
    """A comparison with a baseline, in the metrics that the headline is about.

    gain: what is to be gained, such as the look. keep: what must not be lost meanwhile; None if only one was measured.
    """

    results: Results
    baseline: str
    gain: MetricInfo
    keep: MetricInfo | None

    @property
    def others(self) -> list[str]:
        """The subjects but for the baseline that have the metric."""
        figures = self.results.figures
        names = [subject.name for subject in self.results.subjects if subject.name != self.baseline]
        return [name for name in names if self.gain.name in figures.get(name, {})]

    @property
    def images(self) -> int:
        """Images of each subject."""
        return sum(picture.subject == self.baseline for picture in self.results.pictures)

    @property
    def prompts(self) -> int:
        return len(self.results.axes.get("prompt", ())) or 1

    @property
    def num_units(self) -> int:
        """Independent observations: prompts if there are enough of them, else images."""
        return self.prompts if self.prompts >= MIN_UNITS else self.images

    def relation(self, name: str, metric: MetricInfo, other: str | None = None) -> Relation:
        """How a subject stands to another one, by default the baseline."""
        other = other or self.baseline
        found = [v for v in self.results.verdicts if (v.subject, v.baseline, v.metric) == (name, other, metric.name)]
        a, b = (self.results.figures.get(one, {}).get(metric.name) for one in (name, other))
        if not found:
            return by_intervals(a, b, metric, len(self.others), self.num_units) if a and b else Relation("unknown")
        verdict = found[0]
        if verdict.p < LEVEL:
            return Relation(side(verdict.difference.value, metric))
        exactly_same = verdict.detectable == 0 and verdict.difference.value == 0
        if exactly_same:
            return Relation("same")
        needed = needed_units(abs(verdict.effect), len(self.others))
        return Relation("unknown" if math.isinf(verdict.detectable) else "same", needed)

    def numbers(self, name: str, metric: MetricInfo) -> str:
        """The tested difference from the baseline with its interval; without a test, both values."""
        for v in self.results.verdicts:
            if (v.subject, v.baseline, v.metric) == (name, self.baseline, metric.name):
                sizes = sorted(abs(end) for end in (v.difference.low, v.difference.high) if end is not None)
                interval = f", 95 % interval {sizes[0]:.2g} to {sizes[1]:.2g}" if len(sizes) == 2 else ""
                return f"by {abs(v.difference.value):.2g}{interval}"
        own, base = (self.results.figures[one][metric.name] for one in (name, self.baseline))
        ends = ""
        if own.low is not None and own.high is not None:
            ends = f", 95 % interval {own.low:.3g} to {own.high:.3g}"
        return f"{metric.label} {own.value:.3g}{ends}; {self.baseline} {base.value:.3g}"

    def value(self, name: str) -> float:
        """What is to be gained; more is better."""
        found = self.results.figures[name][self.gain.name].value
        return -found if self.gain.better == "lower" else found


def headline(results: Results, baseline: str, front: Sequence[str]) -> Headline:
    """The headline of a comparison. front: metrics by importance: what to keep, then what to gain."""
    directed = {metric.name: metric for metric in results.metrics if metric.better is not None}
    measured = [name for name in directed if name in results.figures.get(baseline, {})]
    chosen = [directed[name] for name in [*front, *measured] if name in measured]
    chosen = list(dict.fromkeys(chosen))
    if len(results.subjects) == 1:
        return alone(results, baseline, chosen)
    looks = "nothing measured says which is better; look at the images, or vote without knowing whose they are."
    if not chosen:
        count = f"{len(results.pictures)} images of {len(results.subjects)} subjects"
        return Headline(f"{count}: {looks}", "For metrics, set judge= and reference=.")
    two = len(chosen) > 1 and {chosen[0].name, chosen[1].name} <= {*front}
    compared = Compared(results, baseline, chosen[1] if two else chosen[0], chosen[0] if two else None)
    if not compared.others:
        return Headline(f"Only {baseline} has a {compared.gain.label}: {looks}", "")
    return Headline(sentence(compared), results.tradeoff.reason if results.tradeoff else missing(compared))


def alone(results: Results, name: str, chosen: Sequence[MetricInfo]) -> Headline:
    """The headline where there is one subject."""
    figures = []
    for metric in chosen[:2]:
        own = results.figures[name][metric.name]
        ends = "" if own.low is None or own.high is None else f" (95 % interval {own.low:.3g} to {own.high:.3g})"
        figures.append(f"{metric.label} {own.value:.3g}{ends}")
    told = f": {' and '.join(figures)}" if figures else ""
    return Headline(f"{name} alone{told}.", "With a second subject, the page says which one to keep.")


def sentence(compared: Compared) -> str:
    """Which subject to keep and why, or that the images do not say."""
    base, gain, keep = compared.baseline, compared.gain, compared.keep
    gains = {name: compared.relation(name, gain).kind for name in compared.others}
    losses = {name: compared.relation(name, keep).kind if keep else "same" for name in compared.others}
    winners = [name for name in compared.others if gains[name] == "better" and losses[name] != "worse"]
    costly = [name for name in compared.others if gains[name] == "better" and losses[name] == "worse"]
    if winners:
        return keep_sentence(compared, max(winners, key=compared.value), winners, costly)
    if costly:
        return costly_sentence(compared, max(costly, key=compared.value))
    faithful = [name for name in compared.others if keep and losses[name] == "better"]
    if faithful and keep:
        best = max(faithful, key=lambda name: gains[name] != "worse")
        numbers = compared.numbers(best, keep)
        if gains[best] == "worse":
            return f"{best} is {said(keep).better} than {base} ({numbers}), but {said(gain).worse}."
        return f"Keep {best}: {said(keep).better} than {base} ({numbers}) and {said(gain).same}."
    behind = [name for name in compared.others if "worse" in (gains[name], losses[name])]
    if len(behind) < len(compared.others):
        return undecided(compared, [name for name in compared.others if name not in behind], behind)
    worse = [said(metric).worse for metric, of in ((gain, gains), (keep, losses)) if metric and "worse" in of.values()]
    if len(behind) > 1:
        return f"Keep {base}: {joined(behind)} are {' or '.join(worse)}."
    detail = f" ({compared.numbers(behind[0], gain)})" if gains[behind[0]] == "worse" else ""
    return f"Keep {base}: {behind[0]} is {' and '.join(worse)}{detail}."


def keep_sentence(compared: Compared, best: str, winners: Sequence[str], costly: Sequence[str]) -> str:
    """One subject gains without a detectable loss."""
    gain, keep, base = compared.gain, compared.keep, compared.baseline
    leaders = [name for name in costly if compared.value(name) > compared.value(best)]
    leader = max(leaders, key=compared.value, default=None)
    start = f"Keep {best}"
    if leader is not None and keep is not None:
        start = f"{leader} is {said(gain).best} but {said(keep).worse} than {base}; keep {best}"
    superlative = leader is None and len(compared.others) > 1
    peers = [
        name for name in winners if name != best and compared.relation(best, gain, name).kind in ("same", "unknown")
    ]
    is_best = superlative and not peers
    words = said(gain).best if is_best else f"{said(gain).better} than {base}"
    text = f"{start}: {words} ({compared.numbers(best, gain)})"
    if keep is not None:
        kind = compared.relation(best, keep).kind
        than = f" than {base}" if is_best else ""
        alike = f" as {base}" if is_best else ""
        text += {
            "better": f" and {said(keep).better}{than}",
            "same": f" and {said(keep).same}{alike}",
            "unknown": f"; whether it is {said(keep).same}, so few images cannot say",
        }.get(kind, "")
    if peers:
        text += f"; these images cannot tell it from {joined(peers)}"
    return f"{text}."


def costly_sentence(compared: Compared, best: str) -> str:
    """Every gain costs something."""
    gain, keep, base = compared.gain, compared.keep, compared.baseline
    assert keep is not None
    several = len(compared.others) > 1
    text = f"{best} is {said(gain).best if several else f'{said(gain).better} than {base}'}"
    text += f" ({compared.numbers(best, gain)}) but {said(keep).worse}{f' than {base}' if several else ''}"
    text += f" ({compared.numbers(best, keep)})"
    tradeoff = compared.results.tradeoff
    kept = tradeoff.recommended if several and tradeoff else base
    if kept not in (best, base):
        is_certain = compared.relation(kept, gain).kind == "better"
        balance = "is the best balance" if is_certain else "may keep both, which these images cannot tell"
        return f"{text}; {kept} {balance}."
    return f"{text}; {'no subject keeps both' if several else 'which to keep depends on what matters more'}."


def undecided(compared: Compared, unclear: Sequence[str], behind: Sequence[str]) -> str:
    """No subject is better for certain, and some may be."""
    base, now = compared.baseline, compared.num_units
    images = f"These {compared.images} images of each" if compared.images > 1 else "One image of each"
    text = f"{images} cannot tell {joined(unclear, 'or')} from {base}"
    text += f", and {joined(behind)} {'is' if len(behind) == 1 else 'are'} worse" if behind else ""
    by_prompt = compared.prompts >= MIN_UNITS
    if now < MIN_UNITS:
        return f"{text}; draw at least {math.ceil(MIN_UNITS / compared.prompts)} seeds, or {MIN_UNITS} prompts."
    metrics = [metric for metric in (compared.gain, compared.keep) if metric]
    found = [compared.relation(name, metric).units for name in unclear for metric in metrics]
    units = min((each for each in found if each is not None), default=None)
    if units is None:
        return f"{text}: they are the same in {' and '.join(metric.label for metric in metrics)}."
    needed = rounded(max(units, 1.2 * now) / (1 if by_prompt else compared.prompts))
    if needed > MOST_DRAWN:
        return f"{text}: they are alike, or nearly so."
    return f"{text}; draw about {needed} {'prompts' if by_prompt else 'seeds'}."


def missing(compared: Compared) -> str:
    """What was not measured, and so is not in the sentence."""
    names = {metric.name for metric in compared.results.metrics}
    gaps = []
    if "adherence" not in names:
        gaps.append("Whether prompts are followed was not measured; judge= names a CLIP for it.")
    if not any(SAID.get(name) is LOOK for name in names):
        gaps.append("The look was not measured; reference= gives images of it.")
    return " ".join(gaps)


def by_intervals(a: Estimate, b: Estimate, metric: MetricInfo, num_comparisons: int, num_units: int) -> Relation:
    """Whether two estimates of `num_units` observations differ, by their 95 % intervals; see the module docstring."""
    halves = [(one.high - one.low) / 2 for one in (a, b) if one.low is not None and one.high is not None]
    if len(halves) < 2:
        return Relation("unknown")
    difference, normal = a.value - b.value, stats.norm
    error = math.hypot(*halves) / normal.ppf(1 - LEVEL / 2)
    least = normal.ppf(1 - LEVEL / max(num_comparisons, 1) / 2) * error
    if abs(difference) > least:
        return Relation(side(difference, metric))
    # An estimate's error falls with the root of its observations.
    return Relation(
        "same", needed_units(abs(difference) / (error * math.sqrt(num_units)) if error else 0, num_comparisons)
    )


def side(difference: float, metric: MetricInfo) -> Kind:
    """Whether a difference is for the better."""
    return "better" if (difference > 0) == (metric.better == "higher") else "worse"


def said(metric: MetricInfo) -> Words:
    """The words of a metric; those of others are made of its label."""
    label = metric.label
    return SAID.get(metric.name) or Words(
        f"better in {label}", f"worse in {label}", f"alike in {label}", f"best in {label}"
    )


def joined(names: Sequence[str], word: str = "and") -> str:
    """`a, b and c`, or `a, b, c and 4 more`."""
    shown = list(names[:MOST_NAMED])
    if len(names) > MOST_NAMED:
        return f"{', '.join(shown)} {word} {len(names) - MOST_NAMED} more"
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} {word} {shown[-1]}"


def rounded(number: float) -> int:
    """Up to two digits: 137 is 140."""
    step = 10 ** max(len(str(math.ceil(number))) - 2, 0)
    return math.ceil(number / step) * step
