"""The order of a run, what a sample is on each visit, and where samples come from."""

from __future__ import annotations

import os
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sdft.data.datamodule import Images, folder, useful_workers
from sdft.data.dataset import ImageDataset, Sample, collate
from sdft.data.order import BatchOrder
from sdft.data.sources import Folder, Mix, ToyWorld, held_out
from sdft.errors import UserError


class TestRunOrder:
    def test_global_batches_are_the_same_on_1x4_and_2x2(self) -> None:
        one = list(BatchOrder(size=7, batch_size=4, seed=0, start=0, stop=9))
        ranks = [list(BatchOrder(7, 2, 0, 0, 9, rank=rank, world_size=2)) for rank in range(2)]
        assert [first + second for first, second in zip(*ranks, strict=True)] == one

    def test_batches_do_not_change_the_sequence(self) -> None:
        """Accumulating 3 batches of 2 sees what one batch of 6 sees."""
        flat = {b: list(chain.from_iterable(BatchOrder(7, b, 0, 0, 12 // b))) for b in (1, 2, 3, 6)}
        assert flat[1] == flat[2] == flat[3] == flat[6]

    def test_a_late_start_goes_on_where_the_run_was(self) -> None:
        whole = list(BatchOrder(size=7, batch_size=4, seed=0, start=0, stop=9))
        for start in range(10):
            assert list(BatchOrder(7, 4, 0, start, 9)) == whole[start:]

    def test_every_sample_comes_once_a_visit(self) -> None:
        seen = list(chain.from_iterable(BatchOrder(size=5, batch_size=3, seed=0, start=0, stop=10)))
        assert [visit for _, visit in seen] == [position // 5 for position in range(30)]
        assert Counter(seen) == {(index, visit): 1 for index in range(5) for visit in range(6)}

    def test_each_visit_and_each_seed_has_its_own_order(self) -> None:
        def orders(seed: int) -> list[tuple[int, ...]]:
            batches_of_visits = BatchOrder(size=20, batch_size=20, seed=seed, start=0, stop=5)
            return [tuple(index for index, _ in batch) for batch in batches_of_visits]

        assert len({*orders(0), *orders(1)}) == 10
        assert orders(0) == orders(0)

    def test_a_batch_may_be_larger_than_the_source(self) -> None:
        (batch,) = BatchOrder(size=2, batch_size=5, seed=0, start=0, stop=1)
        assert [visit for _, visit in batch] == [0, 0, 1, 1, 2]

    def test_length_counts_from_the_start_of_the_run(self) -> None:
        """Lightning adds the batches it has already seen."""
        assert len(BatchOrder(7, 4, 0, start=5, stop=9)) == 9


class TestPictures:
    def test_a_sample_is_a_function_of_seed_key_and_visit(self, tiny_source) -> None:
        """Neither the order of reading, nor its index in the source, nor another object of the same kind matters."""
        options = {"size_hw": (32, 32), "seed": 4, "crop": "random", "flip": True, "caption_dropout": 0.5}
        source = tiny_source(6)
        one, two = ImageDataset(source, **options), ImageDataset(reversed_source(source), **options)
        forward = {(i, v): one[i, v] for i in range(6) for v in range(3)}
        backward = {(i, v): two[5 - i, v] for v in reversed(range(3)) for i in reversed(range(6))}
        for item, example in forward.items():
            assert_same_example(example, backward[item])

    def test_visits_differ(self, tiny_source) -> None:
        pictures = ImageDataset(tiny_source(1), (32, 32), seed=4, crop="random", flip=True, caption_dropout=0.5)
        examples = [pictures[0, visit] for visit in range(40)]
        assert len({example["pixels_BCHW"].numpy().tobytes() for example in examples}) > 10
        assert {example["dropped_B"] for example in examples} == {True, False}

    def test_shares_of_flips_and_dropped_captions(self, tiny_source) -> None:
        """2000 draws: one half and 0.1, within four standard deviations (0.045 and 0.027), and independent."""
        pictures = ImageDataset(tiny_source(5, hw=(32, 32)), (32, 32), seed=4, flip=True, caption_dropout=0.1)
        upright = [pictures.variant(i, flip=False)["pixels_BCHW"] for i in range(5)]
        examples = [(i, pictures[i, visit]) for i in range(5) for visit in range(400)]
        flipped = np.array([not torch.equal(example["pixels_BCHW"], upright[i]) for i, example in examples])
        dropped = np.array([example["dropped_B"] for _, example in examples])
        assert abs(flipped.mean() - 0.5) < 0.045
        assert abs(dropped.mean() - 0.1) < 0.027
        assert abs(np.corrcoef(flipped, dropped)[0, 1]) < 0.09

    def test_single_encoders_are_told_nothing_at_their_shares(self, tiny_source) -> None:
        """2000 draws: 0.3 and 0.1 within four standard deviations (0.041 and 0.027), independent of each other and of
        the joint dropout, which is what it is without them."""
        options = {"size_hw": (32, 32), "seed": 4, "caption_dropout": 0.2}
        joint = ImageDataset(tiny_source(5, hw=(32, 32)), **options)
        each = ImageDataset(tiny_source(5, hw=(32, 32)), **options, encoder_dropout=(0.3, 0.1))
        drawn = []
        for item in [(i, visit) for i in range(5) for visit in range(400)]:
            example = each[item]
            drawn.append([example["dropped_B"], *example.pop("dropped_BE").tolist()])
            assert_same_example(example, joint[item])
        shares, together = np.mean(drawn, axis=0), np.corrcoef(np.array(drawn).T)
        assert abs(shares[1] - 0.3) < 0.041
        assert abs(shares[2] - 0.1) < 0.027
        assert np.abs(together - np.eye(3)).max() < 0.09

    def test_a_flip_tells_the_model_where_it_was_cut(self, tiny_source) -> None:
        """32 x 40 into 32 x 32: the centre crop lies at left 4 either way."""
        pictures = ImageDataset(tiny_source(1), (32, 32), seed=0)
        plain, flipped = (pictures.variant(0, flip) for flip in (False, True))
        assert plain["time_ids_B6"].tolist() == flipped["time_ids_B6"].tolist() == [32, 40, 0, 4, 32, 32]
        assert torch.equal(plain["pixels_BCHW"].flip(-1), flipped["pixels_BCHW"])

    def test_validation_is_never_dropped_or_flipped(self, tiny_source) -> None:
        data = Images(tiny_source(3), tiny_source(4, "held out"), 3, 32, flip=True, caption_dropout=1.0)
        seen = list(data.val_dataloader())
        assert [key for batch in seen for key in batch.keys] == [f"held out/{i}" for i in range(4)]
        assert [len(batch) for batch in seen] == [3, 1]
        assert not any(batch.dropped_B.any() for batch in seen)
        upright = torch.stack([data.validation_set.variant(i, flip=False)["pixels_BCHW"] for i in range(4)])
        assert torch.equal(torch.cat([batch.pixels_BCHW for batch in seen]), upright)

    def test_a_batch_holds_what_its_words_say(self, tiny_source) -> None:
        pictures = ImageDataset(tiny_source(3), (32, 32), seed=0, caption_dropout=0.5)
        batch = collate([pictures[2, 7], pictures[0, 3]])
        assert list(batch.keys) == ["noise/2", "noise/0"]
        assert list(batch.visits) == [7, 3]
        assert list(batch.captions) == ["the cat on a table", "a red cat"]
        assert batch.pixels_BCHW.shape == (2, 3, 32, 32)
        assert (batch.time_ids_B6.shape, batch.time_ids_B6.dtype) == ((2, 6), torch.float32)
        assert (batch.dropped_B.shape, batch.dropped_B.dtype) == ((2,), torch.bool)
        assert (batch.loss_weight_B.tolist(), batch.loss_weight_B.dtype) == ([1.0, 1.0], torch.float32)
        assert batch.moments_BCHW is None

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_workers_change_nothing(self, num_workers: int, tiny_source) -> None:
        pictures = ImageDataset(tiny_source(5), (32, 32), seed=4, crop="random", flip=True, caption_dropout=0.5)
        order = BatchOrder(size=5, batch_size=2, seed=1, start=1, stop=6)
        loader = DataLoader(pictures, batch_sampler=order, collate_fn=collate, num_workers=num_workers)
        for batch, items in zip(loader, order, strict=True):
            direct = collate([pictures[item] for item in items])
            assert batch.keys == direct.keys
            assert batch.visits == direct.visits
            assert batch.captions == direct.captions
            for name in ("pixels_BCHW", "time_ids_B6", "dropped_B", "loss_weight_B"):
                assert torch.equal(getattr(batch, name), getattr(direct, name)), name


class TestCache:
    def test_encoded_once_equals_encoded_live(self, tiny_model, tiny_source) -> None:
        """Up to the float rounding of convolutions over another batch size: 1e-5 of values of order 1."""
        model = tiny_model()
        live, data = (Images(tiny_source(5), tiny_source(2, "held out"), 2, 32, flip=True, seed=3) for _ in range(2))
        data.encode_once(model.encode_moments, torch.device("cpu"), batch_size=3)
        assert set(data.train_set.moments) == {(i, flip, 0) for i in range(5) for flip in (False, True)}
        for cached, fresh in ((data.train_set, live.train_set), (data.validation_set, live.validation_set)):
            for item in [(i, visit) for i in range(len(fresh.source.keys)) for visit in range(3)]:
                with_moments, with_pixels = cached[item], fresh[item]
                moments = model.encode_moments(with_pixels.pop("pixels_BCHW")[None])[0]
                torch.testing.assert_close(with_moments.pop("moments_BCHW"), moments, rtol=1e-5, atol=1e-5)
                assert_same_example(with_moments, with_pixels)

    def test_latents_of_cached_and_live_batches_agree(self, tiny_model, tiny_batch) -> None:
        model, batch = tiny_model(), tiny_batch(3)
        eps = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        live = model.encode_images(batch, eps)
        assert model.latent_shape(batch) == (4, 8, 8)
        batch.moments_BCHW, batch.pixels_BCHW = model.encode_moments(batch.pixels_BCHW), None
        assert model.latent_shape(batch) == (4, 8, 8)
        assert torch.equal(model.encode_images(batch, eps), live)

    def test_random_crops_have_no_cache(self, tiny_source) -> None:
        with pytest.raises(UserError, match=r"data.cache=off for others at every visit, or data.crop=center"):
            Images(tiny_source(3), tiny_source(2), 2, 32, crop="random")
        Images(tiny_source(3), tiny_source(2), 2, 32, crop="random", cache="off")


class TestFolder:
    def test_pictures_and_captions(self, tmp_path: Path) -> None:
        shown = write_pictures(tmp_path, ["a.png", "b.jpg", "deep/er/c.PNG"])
        (tmp_path / "a.txt").write_text("  a cat,\n on a table \n", encoding="utf-8")
        (tmp_path / "b.caption").write_text("собака", encoding="utf-8")
        (tmp_path / "deep/er/c.txt").write_text("braces {are} fine", encoding="utf-8")
        (tmp_path / "notes.md").write_text("no picture")
        samples = samples_of(tmp_path, caption="{caption}, dreamy")
        assert {key: sample.caption for key, sample in samples.items()} == {
            "a.png": "a cat, on a table, dreamy",
            "b.jpg": "собака, dreamy",
            "deep/er/c.PNG": "braces {are} fine, dreamy",
        }
        assert np.array_equal(samples["a.png"].image_HWC, shown["a.png"])
        assert np.array_equal(samples["deep/er/c.PNG"].image_HWC, shown["deep/er/c.PNG"])
        assert samples["b.jpg"].image_HWC.shape == (20, 30, 3)

    def test_the_splits_share_the_pictures_out(self, tmp_path: Path) -> None:
        write_pictures(tmp_path, [f"{i}.png" for i in range(20)])
        train, held_out = (Folder(str(tmp_path), s, 0.2, default_caption="x").keys for s in ("train", "validation"))
        assert held_out
        assert sorted([*train, *held_out]) == sorted(f"{i}.png" for i in range(20))

    def test_the_held_out_share_is_about_what_is_asked(self) -> None:
        """Each name is held out by its own hash: of 2000 at 0.2, 400 are expected, with a deviation of 18."""
        assert 330 < held_out([f"{i}.png" for i in range(2000)], 0.2).sum() < 470

    @pytest.mark.parametrize("share", [0.0, 1.0])
    def test_neither_split_is_ever_empty(self, share: float, tmp_path: Path) -> None:
        write_pictures(tmp_path, ["a.png", "b.png"])
        for split in ("train", "validation"):
            assert len(Folder(str(tmp_path), split, share, default_caption="x").keys) == 1

    def test_adding_pictures_moves_none(self, tmp_path: Path) -> None:
        """A picture that was trained on never becomes one that judges, and the other way round."""
        write_pictures(tmp_path, [f"{i}.png" for i in range(20)])
        splits = {key: "validation" for key in Folder(str(tmp_path), "validation", 0.2, default_caption="x").keys}
        splits |= {key: "train" for key in Folder(str(tmp_path), "train", 0.2, default_caption="x").keys}
        for added in range(20, 60):
            write_pictures(tmp_path, [f"{added}.png"])
            now = {key: "validation" for key in Folder(str(tmp_path), "validation", 0.2, default_caption="x").keys}
            moved = [key for key, split in splits.items() if now.get(key, "train") != split]
            assert not moved, f"adding picture {added} moved {moved}"

    def test_a_missing_caption_is_named(self, tmp_path: Path) -> None:
        write_pictures(tmp_path, ["a.png", "b.png"])
        (tmp_path / "a.txt").write_text("a cat")
        with pytest.raises(UserError, match=r"b\.png has no caption; write one to b\.txt .*data\.default_caption"):
            samples_of(tmp_path)
        captions = {key: sample.caption for key, sample in samples_of(tmp_path, default_caption="a dog").items()}
        assert captions == {"a.png": "a cat", "b.png": "a dog"}

    @pytest.mark.parametrize("name", ["broken.png", "broken.jpg"])
    @pytest.mark.parametrize("keep", [0, 3, 40, 0.5, 0.9])
    def test_an_unreadable_picture_is_named(self, name: str, keep: float, tmp_path: Path) -> None:
        write_pictures(tmp_path, ["good.png", name], hw=(64, 64))
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
        with pytest.raises(UserError, match=rf"{name} cannot be read as an image .*; repair or remove it"):
            _ = [sample.image_HWC for sample in samples_of(tmp_path, default_caption="x").values()]

    def test_an_unreadable_picture_is_named_by_a_worker_too(self, tmp_path: Path) -> None:
        write_pictures(tmp_path, ["a.png", "b.png", "c.png"])
        for name in "abc":
            (tmp_path / f"{name}.png").write_bytes(b"not a picture")
        pictures = ImageDataset(Folder(str(tmp_path), "train", default_caption="x"), (32, 32), seed=0)
        loader = DataLoader(pictures, batch_sampler=BatchOrder(2, 2, 0, 0, 1), collate_fn=collate, num_workers=1)
        with pytest.raises(UserError, match=r"[abc]\.png cannot be read as an image"):
            list(loader)

    @pytest.mark.parametrize("num", [0, 1])
    def test_an_empty_folder_is_an_error(self, num: int, tmp_path: Path) -> None:
        write_pictures(tmp_path, [f"{i}.png" for i in range(num)])
        with pytest.raises(UserError, match=rf"found {num} images, need at least 2 \(.*\.png"):
            Folder(str(tmp_path), "train")

    def test_a_missing_folder_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such folder"):
            Folder(str(tmp_path / "nowhere"), "train")

    @pytest.mark.parametrize(
        ("template", "problem"),
        [
            *((text, r"its fields can be \{caption\}, and nothing else") for text in ("{subject}", "{0}", "{}")),
            *((text, r"its fields can be") for text in ("{caption.__class__}", "{caption[0]}", "{caption!r}")),
            ("{caption:>9999999999}", "its fields can be"),
            ("{caption", "expected '}' before end of string; a brace of the text itself is written twice"),
            ("caption}", "encountered in format string; a brace of the text itself is written twice"),
        ],
    )
    def test_a_wrong_caption_template_is_told(self, template: str, problem: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=rf"data\.caption=.*{problem}"):
            Folder(str(tmp_path), "train", caption=template)

    def test_transparency_lies_on_white_and_exif_turns_the_picture(self, tmp_path: Path) -> None:
        Image.new("RGBA", (30, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
        sideways = Image.new("RGB", (30, 20), "blue")
        exif = Image.Exif()
        exif[0x0112] = 6  # stored on its side: turn by 90 degrees to show
        sideways.save(tmp_path / "turned.jpg", exif=exif)
        Image.new("L", (30, 20), 77).save(tmp_path / "grey.png")
        samples = samples_of(tmp_path, default_caption="x")
        assert np.unique(samples["clear.png"].image_HWC).tolist() == [255]
        assert samples["turned.jpg"].image_HWC.shape == (30, 20, 3)
        assert samples["grey.png"].image_HWC.shape == (20, 30, 3)

    def test_a_folder_feeds_a_run(self, tmp_path: Path) -> None:
        write_pictures(tmp_path, [f"{i}.png" for i in range(5)])
        data = folder(str(tmp_path), batch_size=2, size=16, default_caption="x", flip=True)
        assert (len(data.train_set.source.keys), len(data.validation_set.source.keys)) == (4, 1)
        (batch,) = data.val_dataloader()
        assert batch.time_ids_B6.tolist() == [[20, 30, 0, 4, 16, 16]]


class TestMix:
    def test_names_and_repeats(self, tiny_source) -> None:
        mix = Mix({"new": tiny_source(2), "old": tiny_source(1, "grey")}, repeats={"new": 2})
        assert list(mix.keys) == ["new/noise/0", "new/noise/1", "new/noise/0#1", "new/noise/1#1", "old/grey/0"]
        first, again = mix[0], mix[2]
        assert (first.key, again.key) == ("new/noise/0", "new/noise/0#1")
        assert np.array_equal(first.image_HWC, again.image_HWC)
        assert mix[3].caption == tiny_source(2)[1].caption

    def test_everything_else_about_a_sample_is_kept(self) -> None:
        """Its weight, and the size it had before it was reduced, which conditions the model."""
        world = ToyWorld(["plain"], 2, "train", size=16, loss_weight=0.5, original_sides=[700])
        own, mixed = world[1], Mix({"plain": world})[1]
        assert (own.loss_weight, own.original_hw) == (0.5, (700, 700))
        assert (mixed.loss_weight, mixed.original_hw, mixed.caption) == (0.5, (700, 700), own.caption)
        assert ImageDataset(Mix({"plain": world}), (16, 16), 0).variant(1, False)["time_ids_B6"][0] == 700

    def test_a_repeat_of_nothing_is_refused(self, tiny_source) -> None:
        with pytest.raises(UserError, match=r"data\.repeats names \['odl'\]; the sources are \['old'\]"):
            Mix({"old": tiny_source(1)}, repeats={"odl": 2})


def reversed_source(source):
    class Reversed:
        keys = source.keys[::-1]

        def __getitem__(self, index: int) -> Sample:
            return source[len(source.keys) - 1 - index]

    return Reversed()


def assert_same_example(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name], name


def write_pictures(root: Path, names: list[str], hw: tuple[int, int] = (20, 30)) -> dict[str, np.ndarray]:
    """Pictures of noise, each its own."""
    written = {}
    for name in names:
        written[name] = np.random.default_rng(sum(name.encode())).integers(0, 256, (*hw, 3), dtype=np.uint8)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(written[name]).save(root / name)
    return written


def samples_of(root: Path, **options) -> dict[str, Sample]:
    """Every sample of both splits, by key."""
    splits = [Folder(str(root), split, **options) for split in ("train", "validation")]
    return {key: source[index] for source in splits for index, key in enumerate(source.keys)}


def test_as_many_workers_as_have_something_to_do(monkeypatch: pytest.MonkeyPatch, tiny_source) -> None:
    """`num_workers=auto`: the cores of each device but its own, at most 8, and none where images are cached."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(32)))
    assert [useful_workers(True, devices) for devices in (1, 8, 32, 64)] == [8, 3, 0, 0]
    assert useful_workers(False, 1) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    source = tiny_source(4)
    live, kept = (Images(source, source, 2, 32, cache=cache, num_workers="auto") for cache in ("off", "ram"))
    for data in (live, kept):
        data.trainer = SimpleNamespace(
            max_steps=2, accumulate_grad_batches=1, global_rank=0, world_size=1, num_devices=1
        )
    assert live.train_dataloader().num_workers == 1
    assert kept.train_dataloader().num_workers == 0
