"""Several sides in one run: `data.sizes`."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import chain, islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import slow
from PIL import Image
from small_runs import KillAt, Run, assert_same_end, finish, result, start
from test_commands import run as run_command

from sdft.data.augmentation import Augmentation
from sdft.data.buckets import bucket_sizes
from sdft.data.datamodule import Images
from sdft.data.dataset import collate
from sdft.data.order import BatchOrder
from sdft.data.sizes import SizeOrder, Sizes, sizes_of
from sdft.data.sources import Folder
from sdft.errors import UserError
from sdft.planning.steps import num_steps
from sdft.rng import Draws

THREE = {32: 1, 48: 1, 64: 2}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two wide pictures, a high one, and a small square one."""
    folder = tmp_path / "in"
    folder.mkdir()
    g = np.random.default_rng(0)
    for i, hw in enumerate([(100, 150), (100, 150), (120, 80), (40, 40)]):
        Image.fromarray(g.integers(0, 256, (*hw, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def images(root: Path, **options) -> Images:
    source = Folder(str(root), "all")
    return Images(source, source, batch_size=2, size=64, seed=3, **{"sizes": THREE, "cache": "off"} | options)


class TestTurns:
    def test_by_hand(self) -> None:
        """Of four steps, one has each of the smaller sides and two the largest; ascending, in this order."""
        together, ascending = (sizes_of({64: 2, 32: 1, 48: 1}, schedule, None) for schedule in (None, "ascending"))
        assert (together.sides, together.shares) == ((32, 48, 64), (0.25, 0.25, 0.5))
        # What each lacks: 1/4 1/4 1/2; then 1/2 1/2 0; then -1/4 3/4 1/2; then 0 0 1.
        assert list(islice(together.turns(8), 8)) == [2, 0, 1, 2] * 2
        assert list(islice(ascending.turns(8), 10)) == [0, 0, 1, 1, 2, 2, 2, 2, 2, 2]
        assert list(islice(ascending.turns(2), 2)) == [1, 2], "round(0.5) is 0: a short run leaves a side out"

    def test_shares_are_kept_at_any_time(self) -> None:
        plan = Sizes((16, 32, 48, 64), (0.07, 0.4, 0.21, 0.32))
        done = Counter()
        for step, side in enumerate(islice(plan.turns(1000), 1000), 1):
            done[side] += 1
            assert all(abs(done[k] - share * step) < 1 for k, share in enumerate(plan.shares))


BUCKETS = {"16x32": range(6), "32x16": range(6, 9), "32x64": range(9, 15), "64x32": range(15, 18)}
NUM = 40


class TestOrder:
    """Six wide and three high pictures at two sides; the larger has three times as many steps."""

    def order(self, batch_size: int = 4, start: int = 0, schedule: str = "together", **options) -> list:
        steps = SizeOrder(Sizes((24, 48), (0.25, 0.75), schedule), [0, 0, 1, 1], NUM)
        stop = NUM * options.get("accumulate", 1)
        return list(BatchOrder(18, batch_size, 0, start, stop, buckets=BUCKETS, order=steps, **options))

    def test_each_step_is_of_one_bucket(self) -> None:
        for first, second in zip(*[iter(self.order(2, accumulate=2))] * 2, strict=True):
            members = {index for index, _ in first + second}
            assert sum(not members.isdisjoint(bucket) for bucket in BUCKETS.values()) == 1

    @pytest.mark.parametrize("schedule", ["together", "ascending"])
    def test_ranks_accumulation_and_resuming_change_nothing(self, schedule: str) -> None:
        whole = self.order(schedule=schedule)
        ranks = [self.order(2, schedule=schedule, rank=rank, world_size=2) for rank in range(2)]
        assert [first + second for first, second in zip(*ranks, strict=True)] == whole
        assert list(chain(*self.order(2, schedule=schedule, accumulate=2))) == list(chain(*whole))
        for first in range(NUM + 1):
            assert self.order(start=first, schedule=schedule) == whole[first:]

    @pytest.mark.parametrize("schedule", ["together", "ascending"])
    def test_every_picture_comes_equally_often_at_a_side(self, schedule: str) -> None:
        """10 steps of 4 at the smaller side. A pass over it takes ceil(6 / 4) + ceil(3 / 4) = 3 steps at first: by the
        end of pass p, the buckets have had ceil(6 p / 4) and ceil(3 p / 4), and four passes are 6 + 3 = 9."""
        steps = self.order(schedule=schedule)
        small = [batch for batch in steps if batch[0][0] < 9]
        assert len(small) == 10
        if schedule == "ascending":
            assert steps[:10] == small
        seen = Counter(index for index, _ in chain(*small[:9]))
        assert seen == dict.fromkeys(range(9), 4)
        visits = defaultdict(list)
        for index, visit in chain(*steps):
            visits[index].append(visit)
        assert all(found == list(range(len(found))) for found in visits.values())


class TestExamples:
    @pytest.mark.parametrize(
        ("step", "time_ids"),
        [
            # 100 x 150 covers a square of 32 as 32 x 48, of 48 as 48 x 72, and of 64 as 64 x 96.
            (None, [(100, 150, 0, 8, 32, 32), (100, 150, 0, 12, 48, 48), (100, 150, 0, 16, 64, 64)]),
            # log 1.5 = 0.41 is nearer to log 1 than to log 4 (16 x 64), to log 2 (32 x 64), and to log 5/3 (48 x 80).
            # It covers 32 x 64 as 43 x 64, and 48 x 80 as 53 x 80; half of the surplus is rounded up.
            (16, [(100, 150, 0, 8, 32, 32), (100, 150, 6, 0, 32, 64), (100, 150, 3, 0, 48, 80)]),
        ],
    )
    def test_sizes_and_crops_by_hand(self, step: int | None, time_ids, root: Path) -> None:
        data = images(root, bucket_step=step)
        items = data.train_set.items_of_samples()
        assert items[0] == [0, 4, 8]
        found = [data.train_set[item, 0] for item in items[0]]
        assert [tuple(map(int, example["time_ids_B6"])) for example in found] == time_ids
        assert [tuple(example["pixels_BCHW"].shape[1:]) for example in found] == [ids[4:] for ids in time_ids]
        assert {example["keys"] for example in found} == {"0.png"}

    def test_validation_stays_at_size(self, root: Path) -> None:
        assert {tuple(batch.pixels_BCHW.shape[2:]) for batch in images(root).val_dataloader()} == {(64, 64)}

    def test_no_visit_of_a_picture_has_the_draws_of_another(self, root: Path) -> None:
        """Visit v at side k is number 3 v + k, which noise and timestep are drawn by."""
        data = images(root, crop="random").train_set
        pairs = [(data.items.sample_of[i], data[i, v]["visits"]) for i in range(12) for v in range(5)]
        assert len(set(pairs)) == 60
        assert [data[item, 2]["visits"] for item in (0, 4, 8)] == [6, 7, 8]
        draws = [Draws(0, ["0.png"], [visit]).normal("noise", (4,)) for sample, visit in pairs if sample == 0]
        assert len({tuple(noise[0].tolist()) for noise in draws}) == 15

    def test_variants_come_in_turn_at_each_side(self, root: Path) -> None:
        data = images(root, crop="random", variants=3, augmentation=Augmentation(zoom=0.5)).train_set
        for item in (0, 4, 8):
            crops = [tuple(data[item, visit]["time_ids_B6"].tolist()) for visit in range(6)]
            assert crops[:3] == crops[3:]
            assert len(set(crops)) == 3

    def test_buckets_of_two_sides_are_never_the_same(self) -> None:
        for step in (16, 64):
            found = [set(bucket_sizes(side, step)) for side in range(step, 1600, step)]
            assert all(a.isdisjoint(b) for a, b in pairwise(found))
            assert len(set().union(*found)) == sum(map(len, found))

    def test_masks_follow(self, root: Path) -> None:
        Image.open(root / "0.png").convert("L").save(root / "0.mask.png")
        data = images(root, masks=True).train_set
        assert [tuple(data[item, 0]["mask_B1HW"].shape) for item in (0, 4, 8)] == [(1, s, s) for s in (32, 48, 64)]


class TestSmallPictures:
    def test_they_are_left_out_of_larger_sides(self, root: Path) -> None:
        """40 x 40 covers 32 only, and 120 x 80 all."""
        data = images(root, no_upscale=True)
        assert list(data.train_set.items.sample_of) == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]
        assert "1 x not trained at 48: smaller (data.no_upscale)" in data.left_out
        assert "1 x not trained at 64: smaller (data.no_upscale)" in data.left_out
        assert images(root).left_out == []
        assert len(images(root).train_set.items.sample_of) == 12

    def test_those_that_are_too_small_for_all_are_told(self, root: Path) -> None:
        data = images(root, no_upscale=True, sizes={48: 1, 64: 1})
        assert "1 x not trained at all: smaller than data.sizes" in data.left_out
        assert data.train_set.items_of_samples()[3] == []

    def test_a_side_that_none_covers_is_refused(self, root: Path) -> None:
        with pytest.raises(
            UserError, match=r"no_upscale=true: no image is large enough for the side 128 of data.sizes"
        ):
            images(root, no_upscale=True, sizes={32: 1, 128: 1})


class TestCache:
    @pytest.mark.parametrize("cache", ["ram", "disk"])
    def test_all_sides_are_encoded_once(self, cache: str, root: Path, tmp_path: Path, tiny_model) -> None:
        model = tiny_model()
        options = {"flip": True, "bucket_step": 16}
        live = images(root, **options).train_set
        data = images(root, cache=cache, cache_dir=str(tmp_path / "cache"), **options)
        encoded = []

        def encode(pixels_BCHW: torch.Tensor) -> torch.Tensor:
            encoded.append(len(pixels_BCHW))
            return model.encode_moments(pixels_BCHW)

        data.encode_once(encode, torch.device("cpu"), vae=model.vae)
        # Four pictures at three sides, flipped or not; those of validation at 64 unflipped are the same entries.
        assert sum(encoded) == 24 + (4 if cache == "ram" else 0)
        for item in range(12):
            for visit in range(4):
                found, expected = data.train_set[item, visit], live[item, visit]
                assert "pixels_BCHW" not in found
                batch = collate([expected])
                torch.testing.assert_close(
                    found["moments_BCHW"], model.encode_moments(batch.pixels_BCHW)[0], rtol=1e-4, atol=1e-4
                )
                assert torch.equal(found["time_ids_B6"], expected["time_ids_B6"])
        if cache == "disk":
            images(root, cache=cache, cache_dir=str(tmp_path / "cache"), **options).encode_once(
                encode, torch.device("cpu"), vae=model.vae
            )
            assert sum(encoded) == 24, "the next run finds them"


def test_the_commands_see_all_sides(root: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    sizes = "data.sizes={32: 1, 64: 1}"
    words = [f"data.root={root}", f"out={tmp_path}/sheets", "size=64", "data.bucket_step=16", sizes]
    told = run_command("check", capsys, monkeypatch, *words)
    lines = {line.split("  ")[0].strip(): line for line in told.splitlines()}
    assert " 4, and 0 that cannot be read" in lines["images"]
    assert "1: 3.png" in lines["enlarged"], "40 x 40 at 64"
    assert "none" in lines["duplicates"]
    counts = [int(line.split()[3]) for line in told.splitlines() if " x " in line and line.startswith("     ")]
    assert sum(counts) == 3 * 2 + 1, "three for training at two sides, and one held out"
    assert (tmp_path / "sheets" / "32x32.png").is_file()
    words = [f"data.root={root}", f"out={tmp_path}/cache", sizes]
    # Three at two sides, the held-out one at one, five captions with the empty one.
    assert "12 entries in" in run_command("cache", capsys, monkeypatch, *words)


def test_a_pass_is_as_many_pictures_as_there_are(root: Path) -> None:
    """Of four pictures at squares, a step of 2 reads two: 2 steps at each side, 2 on average. With no_upscale, three
    are at 64: 0.5 * 2 + 0.5 * 2; and steps of 1 are 0.5 * 4 + 0.5 * 3."""
    assert num_steps(images(root), per_step=2, epochs=10, fewest=1, most=1000) == 20
    left = images(root, sizes={32: 1, 64: 1}, no_upscale=True)
    assert num_steps(left, per_step=2, epochs=10, fewest=1, most=1000) == 20
    assert num_steps(left, per_step=1, epochs=10, fewest=1, most=1000) == 35


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": {}}, r"data\.sizes={}: names no side"),
        ({"sizes": {50: 1, 64: 1}}, r"data\.sizes: 50: must be a multiple of 16, and of 64 for SDXL; try 64"),
        ({"sizes": {32: 1, 48: 0}}, r"data\.sizes: 48 has the weight 0; set one above 0, or leave 48 out"),
        ({"sizes": {48: 1}, "bucket_step": 32}, r"bucket_step=32: .* that divides 48, of data\.sizes"),
        (
            {"sizes": None, "size_schedule": "ascending"},
            r"size_schedule=ascending: there is one size; set 'data\.sizes=",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict, message: str, root: Path) -> None:
    with pytest.raises(UserError, match=message):
        images(root, **options)


SIZED = {"sizes": {16: 1, 32: 2}, "max_steps": 8, "save_every": 2, "bucket_step": 16}


@pytest.mark.parametrize("schedule", ["together", slow("ascending")])
def test_a_killed_run_ends_with_the_same_bits(schedule: str, tmp_path: Path) -> None:
    options = SIZED | {"size_schedule": schedule}
    straight = Run(tmp_path / "straight", **options)
    expected = result(straight)
    killed = Run(tmp_path / "killed", **options)
    assert finish(start(Run(killed.folder, **options, callbacks=[KillAt(5, saved=killed.last)]))) == [-9]
    assert_same_end(straight, killed, expected, result(Run(killed.folder, **options, resume=killed.last)))


def test_accumulation_and_the_cache_change_nothing(tmp_path: Path) -> None:
    one = result(Run(tmp_path / "one", batch_size=4, **SIZED))
    two = result(Run(tmp_path / "two", batch_size=2, accumulate=2, **SIZED))
    losses = torch.tensor(two["losses"]).view(-1, 2).mean(1)
    torch.testing.assert_close(losses, torch.tensor(one["losses"]), rtol=2e-3, atol=0)
    live = result(Run(tmp_path / "live", batch_size=4, cache="off", **SIZED))
    torch.testing.assert_close(torch.tensor(live["losses"]), torch.tensor(one["losses"]), rtol=2e-3, atol=0)


def test_other_sizes_than_those_of_the_checkpoint_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", **SIZED | {"max_steps": 2})
    result(run)
    again = Run(tmp_path / "again", resume=run.last, **SIZED | {"sizes": {16: 1, 32: 1}})
    assert finish(start(again)) == [7]
    told = (again.folder / "error_0.txt").read_text()
    assert "{16: 0.5, 32: 0.5} together as data.sizes instead of {16: 0.333, 32: 0.667} together" in told
