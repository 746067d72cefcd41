"""Several training sizes in one run: the side of each optimizer step, and the sizes at which each image is trained.

Sides are in pixels, and are numbered from the smallest to the largest.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, islice
from typing import Literal, NamedTuple

from sdft.data.buckets import bucket_sizes, check_sizes, nearest_bucket
from sdft.data.order import bucket_order
from sdft.errors import UserError

SizeSchedule = Literal["together", "ascending"]


@dataclass(frozen=True)
class Sizes:
    """The sides of a run.

    sides: ascending. shares: of the optimizer steps, 1 in total. schedule: `together` mixes the sides over the whole
    run; `ascending` trains one after another.
    """

    sides: tuple[int, ...]
    shares: tuple[float, ...]
    schedule: SizeSchedule = "together"

    def buckets(self, step: int | None) -> list[list[tuple[int, int]]]:
        """The training sizes of each side, (h, w); without a `step`, a square. No two sides have the same size: a
        bucket of one side has room for another step at any larger one."""
        return [bucket_sizes(side, step) if step else [(side, side)] for side in self.sides]

    def too_small(self, items: Items, num: int) -> list[str]:
        """A line for each side at which not all of `num` samples are trained."""
        counts = Counter(items.side_of)
        lines = [
            f"{num - counts[number]} x not trained at {side}: smaller (data.no_upscale)"
            for number, side in enumerate(self.sides)
            if counts[number] < num
        ]
        never = num - len(set(items.sample_of))
        return [*lines, *([f"{never} x not trained at all: smaller than data.sizes"] if never else [])]

    def __str__(self) -> str:
        weights = ", ".join(f"{side}: {share:.3g}" for side, share in zip(self.sides, self.shares, strict=True))
        return f"{{{weights}}} {self.schedule}"

    def turns(self, num_steps: int) -> Iterator[int]:
        """The number of the side of each optimizer step, without an end.

        num_steps: of the run. Together, each step has the side that lacks most steps of its share so far.
        """
        if self.schedule == "ascending":
            begins = [round(num_steps * share) for share in accumulate(self.shares)][:-1]  # of all but the first
            return (sum(step >= begin for begin in begins) for step in count())
        return self._mixed()

    def _mixed(self) -> Iterator[int]:
        done = [0] * len(self.sides)
        for step in count(1):
            lacking = [share * step - had for share, had in zip(self.shares, done, strict=True)]
            side = lacking.index(max(lacking))
            done[side] += 1
            yield side


def sizes_of(sizes: Mapping[int, float] | None, schedule: SizeSchedule | None, bucket_step: int | None) -> Sizes | None:
    """The sides of a run from `data.sizes` and `data.size_schedule`; None for a run of one size. Raises UserError."""
    if sizes is None:
        if schedule is not None:
            raise UserError(
                f"data.size_schedule={schedule}: there is one size; set 'data.sizes={{512: 1, 1024: 1}}' as well, or "
                "leave it null"
            )
        return None
    if not sizes:
        raise UserError("data.sizes={}: names no side; set 'data.sizes={512: 1, 1024: 1}', or null to train at size")
    for side, weight in sizes.items():
        check_sizes(side, bucket_step, "data.sizes")
        if not weight > 0:
            raise UserError(f"data.sizes: {side} has the weight {weight}; set one above 0, or leave {side} out")
    sides, total = sorted(sizes), sum(sizes.values())
    return Sizes(tuple(sides), tuple(sizes[side] / total for side in sides), schedule or "together")


class Items(NamedTuple):
    """What a pass over the data has once: each sample, or at several sides each sample at each, in order of the sides.

    sample_of, side_of: the number of the sample, and of the side, of each item. targets: sizes (h, w) in pixels; empty
    where all are the same.
    """

    sample_of: Sequence[int]
    side_of: Sequence[int]
    targets: Sequence[tuple[int, int]] = ()


def items_of(
    originals_hw: Iterable[tuple[int, int]], buckets: Sequence[Sequence[tuple[int, int]]], enlarge: bool = True
) -> Items:
    """Images of these sizes at the nearest bucket of each side.

    enlarge: whether also where an image does not cover the bucket. Raises UserError for a side that no image covers.
    """
    originals = list(originals_hw)
    samples, sides, targets = array("q"), array("i"), list[tuple[int, int]]()
    for number, sizes in enumerate(buckets):
        before = len(targets)
        for sample, hw in enumerate(originals):
            target = nearest_bucket(hw, sizes)
            if enlarge or covers(hw, target):
                samples.append(sample)
                sides.append(number)
                targets.append(target)
        if len(targets) == before:
            side = max(map(min, sizes))
            raise UserError(
                f"data.no_upscale=true: no image is large enough for the side {side} of data.sizes; leave {side} out, "
                "or set data.no_upscale=false"
            )
    return Items(samples, sides, targets)


def covers(hw: tuple[int, int], target_hw: tuple[int, int]) -> bool:
    """Whether an image can be cropped to a size without being enlarged."""
    return all(side >= target for side, target in zip(hw, target_hw, strict=True))


@dataclass(frozen=True)
class SizeOrder:
    """The order of buckets where a run has several sides; called like `bucket_order`, of which each side has its own.

    side_of: the number of the side of each bucket. num_steps: optimizer steps of the run.
    """

    plan: Sizes
    side_of: Sequence[int]
    num_steps: int

    def __call__(self, sizes: Sequence[int], num: int, seed: int, first: int) -> Iterator[tuple[int, int]]:
        turns = self.plan.turns(self.num_steps)
        done = Counter(islice(turns, first))
        buckets: dict[int, list[int]] = {}
        for bucket, side in enumerate(self.side_of):
            buckets.setdefault(side, []).append(bucket)
        orders = {
            side: bucket_order([sizes[bucket] for bucket in own], num, seed, done[side], str(self.plan.sides[side]))
            for side, own in buckets.items()
        }
        for side in turns:
            place, steps_before = next(orders[side])
            yield buckets[side][place], steps_before
