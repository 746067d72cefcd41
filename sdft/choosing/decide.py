"""Which candidate to keep, and why: the most of what is learned that costs nothing detectable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from sdft.errors import UserError
from sdft.evaluation.results import MetricInfo
from sdft.evaluation.statistics import LEVEL
from sdft.evaluation.stopping import Limits, Measurement, improvement, told
from sdft.evaluation.watching import FIGURES, LOOKS


@dataclass(frozen=True)
class Choice:
    """What is recommended.

    recommended: one of the candidates; None if none is better than the base within the limits.
    certain: whether the pictures distinguish it from all others that learned as much.
    reason: a sentence. front: the candidates that no other one dominates.
    """

    recommended: Measurement | None
    certain: bool
    reason: str
    front: list[Measurement]


@dataclass(frozen=True)
class Decision:
    """base: the base's measurement. candidates: checkpoints at strengths."""

    base: Measurement
    candidates: Sequence[Measurement]
    limits: Limits = field(default_factory=Limits)

    @cached_property
    def look(self) -> str:
        """The figure of what is learned. Raises UserError if it was not measured."""
        found = self.base.look
        if found is None:
            raise UserError("choose: what was learned cannot be measured; it needs at least 4 held-out images")
        return found

    def choice(self) -> Choice:
        """Within the limits, the candidates that the leader does not beat in what is learned; of these the one that
        costs least, if that is detectable, otherwise the leader."""
        front = self.front()
        allowed = [one for one in self.candidates if not self.limits.passed(one, self.base)]
        if not allowed:
            least = min(self.candidates, key=self.cost)
            passed = self.limits.passed(least, self.base)
            what = " and ".join(told(least, name) for name in passed)
            return Choice(None, True, f"none: even {self.name(least)} has {what}, beyond the limit", front)
        leader = max(allowed, key=lambda one: one.means[self.look])
        if leader.interval(self.look)[0] <= 0:
            why = f"none: {self.name(leader)} has {told(leader, self.look)}, which cannot be told from the base's"
            return Choice(None, False, why, front)
        peers = [one for one in allowed if one is not leader and not self.leads(leader, one)]
        cheaper = [one for one in peers if self.costs_less(one, leader)]
        kept = min(cheaper, key=self.cost, default=leader)
        rivals = [one for one in [leader, *peers] if one is not kept and not self.costs_less(kept, one)]
        return Choice(kept, not rivals, self.reason(kept, leader, rivals), front)

    def reason(self, kept: Measurement, leader: Measurement, rivals: Sequence[Measurement]) -> str:
        """Why, in a sentence."""
        figures = [told(kept, name) for name in kept.values if name != self.look]
        text = f"{self.name(kept)}: {told(kept, self.look)}"
        text += f", {', '.join(figures)}" if figures else ""
        if kept is not leader:
            better = [name for name in self.costs(kept) if self.is_better(kept, leader, name)]
            what = " and ".join(f"{FIGURES[name].label} {leader.means[name]:.2f}" for name in better)
            text += f"; {self.name(leader)} has learned no more that could be detected, and has {what}"
        if rivals:
            names = ", ".join(self.name(one) for one in rivals[:3]) + (" and others" if len(rivals) > 3 else "")
            count = len(kept.values[self.look])
            text += f"; {count} pictures cannot tell it from {names}"
        return text

    def name(self, one: Measurement) -> str:
        """As `step 160 at strength 0.8`."""
        return f"step {one.step}" + ("" if one.strength == 1 else f" at strength {one.strength:g}")

    def costs(self, one: Measurement) -> list[str]:
        """The figures that are not of what is learned."""
        return [name for name in one.values if name not in LOOKS]

    def cost(self, one: Measurement) -> float:
        """The sum of what is lost; more novelty than that of the training images is no gain."""
        means = one.means
        lost = 1 - min(means.get("adherence", 1.0), 1.0) + max(means.get("forgetting", 0.0), 0.0)
        return lost + max(1 - means.get("novelty", 1.0), 0.0)

    def is_better(self, a: Measurement, b: Measurement, figure: str) -> bool:
        """Whether a figure of `a` is detectably better than that of `b`."""
        gain, p = improvement(a, b, figure)
        return gain > 0 and p < LEVEL

    def leads(self, leader: Measurement, other: Measurement) -> bool:
        """Whether the leader has detectably learned more. One-sided, since nobody has learned more than the leader."""
        gain, p = improvement(leader, other, self.look)
        return gain > 0 and p < 2 * LEVEL  # p is two-sided

    def costs_less(self, a: Measurement, b: Measurement) -> bool:
        """Whether `a` is detectably better than `b` in a figure of cost that matters, and worse in none."""
        better = [name for name in self.costs(a) if self.matters(a, b, name) and self.is_better(a, b, name)]
        worse = [name for name in self.costs(a) if self.matters(a, b, name) and self.is_better(b, a, name)]
        return bool(better) and not worse

    def matters(self, a: Measurement, b: Measurement, figure: str) -> bool:
        """Novelty matters below 1, where images are nearer to training images than those to each other."""
        return figure != "novelty" or min(a.means[figure], b.means[figure]) < 1

    def front(self) -> list[Measurement]:
        """The candidates that no other dominates: at least as good in every figure, and better in one."""

        def signed(one: Measurement) -> list[float]:
            info: dict[str, MetricInfo] = FIGURES
            return [one.means[name] * (1 if info[name].better == "higher" else -1) for name in sorted(one.values)]

        points = [signed(one) for one in self.candidates]
        return [
            one
            for one, own in zip(self.candidates, points, strict=True)
            if not any(all(a >= b for a, b in zip(other, own, strict=True)) and other != own for other in points)
        ]
