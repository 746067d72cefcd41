"""Which samples an optimiser step sees, when a batch has one size: worked by hand, and the laws of it."""

from __future__ import annotations

from collections import Counter
from itertools import chain, islice

import pytest

from sdft.data.datamodule import Images, folder
from sdft.data.order import NUM_PREFETCHED, BatchOrder, PrefetchOrder, bucket_order
from sdft.errors import UserError

BUCKETS = {"wide": list(range(0, 7)), "high": list(range(7, 10)), "square": [10]}
SIZE = 11


def steps(batch_size: int, accumulate: int, num: int, start: int = 0, world_size: int = 1, seed: int = 0) -> list:
    """What each optimiser step sees, over all its batches and ranks."""
    options = {"start": start * accumulate, "stop": num * accumulate, "accumulate": accumulate, "buckets": BUCKETS}
    orders = [BatchOrder(SIZE, batch_size, seed, rank=r, world_size=world_size, **options) for r in range(world_size)]
    ranks = [list(order) for order in orders]
    batches = [list(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]
    return [list(chain.from_iterable(batches[i : i + accumulate])) for i in range(0, len(batches), accumulate)]


class TestBuckets:
    def test_the_same_steps_however_a_batch_is_divided(self) -> None:
        whole = steps(8, 1, 12)
        assert steps(2, 4, 12) == steps(4, 2, 12) == whole
        assert steps(4, 1, 12, world_size=2) == steps(2, 2, 12, world_size=2) == steps(1, 2, 12, world_size=4) == whole

    def test_a_step_has_one_size(self) -> None:
        owner = {index: name for name, indices in BUCKETS.items() for index in indices}
        for step in steps(2, 2, 30):
            assert len({owner[index] for index, _ in step}) == 1

    def test_a_late_start_goes_on_where_the_run_was(self) -> None:
        whole = steps(2, 2, 20)
        for start in range(20):
            assert steps(2, 2, 20, start) == whole[start:]

    def test_a_resume_in_the_middle_of_a_step_too(self) -> None:
        options = {"stop": 24, "accumulate": 4, "buckets": BUCKETS}
        whole = list(BatchOrder(SIZE, 2, 0, start=0, **options))
        assert list(BatchOrder(SIZE, 2, 0, start=7, **options)) == whole[7:]

    def test_turns_by_hand(self) -> None:
        """Steps of 4 over buckets of 7, 3 and 1.

        Due after pass 1: ceil(7/4), ceil(3/4), ceil(1/4) = 2, 1, 1; after pass 2: ceil(14/4), ceil(6/4), 1 = 4, 2, 1;
        after pass 3: 6, 3, 1; after pass 4: 7, 3, 1: only the wide bucket has a turn; pass 5: 9, 4, 2.
        """
        turns = [bucket for bucket, _ in islice(bucket_order([7, 3, 1], 4, 0, 0), 15)]
        passes = [turns[:4], turns[4:7], turns[7:10], turns[10:11], turns[11:15]]
        expected = [[0, 0, 1, 2], [0, 0, 1], [0, 0, 1], [0], [0, 0, 1, 2]]
        assert [sorted(each) for each in passes] == expected

    def test_nobody_is_dropped_and_nobody_is_left_behind(self) -> None:
        """After p passes every sample was seen at least p times, and none more than a step's worth beyond."""
        num = 4
        for passes in range(1, 12):
            due = sum(-(-passes * len(indices) // num) for indices in BUCKETS.values())
            seen = Counter(index for index, _ in chain.from_iterable(steps(num, 1, due)))
            for indices in BUCKETS.values():
                assert min(seen[index] for index in indices) >= passes
                assert sum(seen[index] for index in indices) < passes * len(indices) + num
        counts = Counter(chain.from_iterable(steps(num, 1, due)))
        assert set(counts.values()) == {1}, "a visit of a sample comes once"

    def test_seeds_and_passes_have_their_own_order(self) -> None:
        assert steps(2, 2, 20, seed=1) != steps(2, 2, 20)
        assert steps(2, 2, 20) == steps(2, 2, 20)

    def test_one_bucket_is_the_plain_order(self) -> None:
        plain = list(BatchOrder(7, 2, 3, 0, 20))
        assert list(BatchOrder(7, 2, 3, 0, 20, accumulate=5, buckets={"": range(7)})) == plain


def test_a_folder_with_buckets_feeds_a_run(sources) -> None:
    root = sources["folder"].root
    data = folder(str(root), batch_size=2, size=64, bucket_step=16, held_out=0.4)
    for batch in data.val_dataloader():
        h, w = batch.pixels_BCHW.shape[2:]
        assert batch.time_ids_B6[:, 4:].tolist() == [[h, w]] * len(batch)
    assert {*data.train_set.targets, *data.validation_set.targets} == {(64, 64), (48, 80), (80, 48)}


def test_batches_are_expected_before_they_are_read() -> None:
    order, events = BatchOrder(12, 2, 0, 0, 6), []
    for batch in PrefetchOrder(order, lambda batch: events.append(("expect", batch))):
        events.append(("read", batch))
    a, b, c, d, e, f = order
    assert NUM_PREFETCHED == 4
    assert events[:6] == [*(("expect", batch) for batch in (a, b, c, d, e)), ("read", a)]
    assert events[6:8] == [("expect", f), ("read", b)]
    assert events[8:] == [("read", batch) for batch in (c, d, e, f)]
    assert len(PrefetchOrder(order, print)) == 6


@pytest.mark.parametrize("step", [24, 48])
def test_steps_that_do_not_fit_are_refused(step: int, tiny_source) -> None:
    with pytest.raises(UserError, match=rf"data.bucket_step={step}: must be a multiple of 16 that divides size=64"):
        Images(tiny_source(2), tiny_source(2), batch_size=2, size=64, bucket_step=step)
