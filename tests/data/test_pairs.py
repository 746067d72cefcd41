"""Pairs of pictures: what a table and a vote say, examples with both pictures treated alike, caches, and runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from checks import assert_equal
from PIL import Image
from small_runs import Run, finish, start, train_py
from tiny import build_tiny_model

from sdft.data import pair_datamodule
from sdft.data.augmentation import Augmentation
from sdft.data.dataset import collate
from sdft.data.pair_datamodule import Pairs
from sdft.data.sources.pairs import PairFolder, PairSource, ToyPairs, Votes
from sdft.distributed.strategies import ddp, fsdp
from sdft.errors import UserError
from sdft.evaluation.page.write import write_page
from sdft.evaluation.results import ImageResult, Results, SubjectSummary
from sdft.formats.training_checkpoint import read_state
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.objective.preference import Preference
from sdft.optimizers.optimizers import adamw
from sdft.optimizers.schedules import constant
from sdft.training.checkpoints import last_checkpoint
from sdft.training.run import refuse_unpaired
from sdft.training.trainer import trainer
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full
from sdft.tuning.parameters import trainable_parameters

NUM = 10
TUNINGS = {"full": Full, "lora_unet": partial(Adapter, rank=2, dropout=0.3)}
PAGE = Path(__file__).parents[2] / "sdft" / "evaluation" / "page"


def picture(file: Path, seed: int, hw: tuple[int, int] = (40, 48)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8)).save(file)


def write_table(root: Path, rows: list) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (root / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten pairs: the preferred pictures lie or stand, the others are squares."""
    folder = tmp_path / "pairs"
    for i in range(NUM):
        picture(folder / f"good/{i}.png", i, (40, 60) if i % 3 else (60, 40))
        picture(folder / f"bad/{i}.png", 100 + i, (48, 48))
    write_table(
        folder,
        [{"chosen": f"good/{i}.png", "rejected": f"bad/{i}.png", "caption": f"a cat {i}"} for i in range(NUM)],
    )
    return folder


class TestTable:
    def test_what_it_says(self, root: Path) -> None:
        pairs = PairFolder(str(root), "all", caption="{caption}, red")
        assert list(pairs.keys) == [f"good/{i}.png > bad/{i}.png" for i in range(NUM)]
        assert isinstance(pairs, PairSource)
        one, other = pairs[3], pairs.rejected[3]
        assert (one.caption, other.caption, one.key, other.key) == ("a cat 3, red",) * 2 + (pairs.keys[3],) * 2
        assert np.array_equal(one.image_HWC, np.asarray(Image.open(root / "good/3.png")))
        assert np.array_equal(other.image_HWC, np.asarray(Image.open(root / "bad/3.png")))

    def test_the_split_is_by_the_preferred_picture_and_stays(self, root: Path) -> None:
        """A picture that won twice is not held out and trained on; more pairs do not move others."""
        rows = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]
        rows += [
            {"chosen": f"good/{i}.png", "rejected": f"bad/{(i + 1) % NUM}.png", "caption": "x"} for i in range(NUM)
        ]
        before = set(PairFolder(str(root), "validation", 0.3).keys)
        write_table(root, rows)
        train, held_out = (PairFolder(str(root), split, 0.3) for split in ("train", "validation"))
        winners = [{key.split(" > ")[0] for key in part.keys} for part in (train, held_out)]
        assert not winners[0] & winners[1]
        assert len(train.keys) + len(held_out.keys) == 2 * NUM
        assert before <= set(held_out.keys)

    def test_a_pair_that_was_judged_twice_counts_twice(self, root: Path) -> None:
        row = {"chosen": "good/0.png", "rejected": "bad/0.png", "caption": "x"}
        write_table(root, [row, {**row, "chosen": "good/1.png"}, row])
        keys = list(PairFolder(str(root), "all").keys)
        assert keys == ["good/0.png > bad/0.png", "good/1.png > bad/0.png", "good/0.png > bad/0.png#1"]

    def test_everything_wrong_is_named_with_its_line(self, root: Path) -> None:
        good = {"chosen": "good/0.png", "rejected": "bad/0.png", "caption": "x"}
        write_table(
            root,
            [good, "", {"chosen": "good/0.png", "caption": "x"}, {**good, "rejected": "lost.png"},
             {**good, "rejected": "good/0.png"}, {**good, "caption": None}, {**good, "caption": " "}],
        )  # fmt: skip
        with pytest.raises(UserError) as caught:
            PairFolder(str(root), "train")
        text = str(caught.value)
        assert text.startswith("data.root: ")
        for part in (
            "line 3 has no path of a picture as 'rejected'",
            f"line 4 names lost.png, which is not in {root}",
            "line 5 compares good/0.png with itself",
            "line 6 has no caption",
            "line 7 has an empty caption",
        ):
            assert f"pairs.jsonl {part}" in text, text

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ('{"chosen": ', "line 1 is not JSON"),
            ("[1]", "line 1 is no JSON object"),
            ("", "no pair with a preference"),
            (b"\xff\xfe", "is not UTF-8"),
            (None, "cannot be read"),
        ],
    )
    def test_a_table_that_is_none(self, root: Path, content, problem: str) -> None:
        table = root / "pairs.jsonl"
        table.unlink()
        if content is not None:
            table.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match=rf"^data\.root: .*{problem}"):
            PairFolder(str(root), "train")

    def test_a_caption_for_all(self, root: Path) -> None:
        write_table(root, [{"chosen": f"good/{i}.png", "rejected": "bad/0.png"} for i in range(3)])
        assert PairFolder(str(root), "all", default_caption="a picture")[2].caption == "a picture"

    def test_one_preferred_picture_cannot_be_split(self, root: Path) -> None:
        write_table(root, [{"chosen": "good/0.png", "rejected": f"bad/{i}.png", "caption": "x"} for i in range(3)])
        with pytest.raises(UserError, match="has 1 preferred pictures, needs 2"):
            PairFolder(str(root), "train")


def modules(root: Path, **options) -> Pairs:
    given = {"batch_size": 2, "size": 32, "seed": 3, "cache": "off"} | options
    return Pairs(*(PairFolder(str(root), split, 0.2) for split in ("train", "validation")), **given)


class TestExamples:
    def test_both_pictures_are_flipped_cropped_and_changed_alike(self, root: Path) -> None:
        """Where both files are the same picture, both columns are the same."""
        for i in range(NUM):
            shutil.copy(root / f"good/{i}.png", root / f"bad/{i}.png")
        changes = Augmentation(zoom=0.2, rotation=5.0, brightness=0.3, hue=0.1)
        data = modules(root, flip=True, crop="random", augmentation=changes, bucket_step=16)
        seen = set()
        for index in range(len(data.train_set.source.keys)):
            for visit in range(4):
                example = data.train_set[index, visit]
                assert torch.equal(example["pixels_BCHW"], example["rejected_pixels_BCHW"])
                assert torch.equal(example["time_ids_B6"], example["rejected_time_ids_B6"])
                seen.add(tuple(example["time_ids_B6"].tolist()))
        assert len(seen) > NUM

    def test_each_picture_has_its_own_crop_at_one_size(self, root: Path) -> None:
        """A square of 48 px in a bucket of 48 x 80: resized to 80 x 80 and cropped 16 px from the top."""
        data = modules(root, size=64, bucket_step=16)
        sizes = data.train_set.by_size()
        assert set(sizes) == {(48, 80), (80, 48)}
        for (h, w), indices in sizes.items():
            batch = collate([data.train_set[index, 0] for index in indices])
            assert batch.pixels_BCHW.shape[-2:] == batch.rejected_pixels_BCHW.shape[-2:] == (h, w)
            margins = [16, 0] if h < w else [0, 16]
            assert batch.rejected_time_ids_B6.tolist() == [[48, 48, *margins, h, w]] * len(indices)
            assert {tuple(hw) for hw in batch.time_ids_B6[:, :2].tolist()} == {(60, 40) if h > w else (40, 60)}
            assert batch.rejected.time_ids_B6 is batch.rejected_time_ids_B6
            assert batch.rejected.rejected is None
            assert batch.to("cpu").rejected_pixels_BCHW.shape == batch.pixels_BCHW.shape

    @pytest.mark.parametrize("cache", ["ram", "disk"])
    def test_what_is_cached_is_what_is_read(self, root: Path, tmp_path: Path, cache: str, tiny_model) -> None:
        model, folder = tiny_model(), str(tmp_path / "cache")
        count = []

        def encode(pixels: torch.Tensor) -> torch.Tensor:
            count.append(len(pixels))
            return model.encode_moments(pixels)

        for num in (2 * 2 * 9 + 1, 0 if cache == "disk" else 2 * 2 * 9 + 1):
            data, live = modules(root, cache=cache, cache_dir=folder, flip=True), modules(root, flip=True)
            data.encode_once(encode, torch.device("cpu"), vae=model.vae)
            assert (len(data.train_set.source.keys), sum(count)) == (9, num), "nine pairs and their mirror images"
            count.clear()
        data.train_set.prefetch([(0, 0), (1, 3)])
        for index in range(9):
            cached, fresh = data.train_set[index, 1], live.train_set[index, 1]
            for name in ("", "rejected_"):
                assert f"{name}pixels_BCHW" not in cached
                moments = encode(fresh[f"{name}pixels_BCHW"][None])[0]
                torch.testing.assert_close(cached[f"{name}moments_BCHW"], moments, rtol=1e-5, atol=1e-5)
                assert torch.equal(cached[f"{name}time_ids_B6"], fresh[f"{name}time_ids_B6"])
        assert set(data.validation_set[0, 0]).isdisjoint({"rejected_moments_BCHW", "rejected_pixels_BCHW"})

    def test_pairs_are_left_out_whole(self, root: Path, tmp_path: Path) -> None:
        keys = list(PairFolder(str(root), "train", 0.2).keys)
        (root / keys[1].split(" > ")[1]).write_bytes(b"no picture")
        (root / keys[2].split(" > ")[0]).write_bytes(b"no picture")
        with pytest.raises(UserError, match=r"bad/\d\.png cannot be read as an image .* data\.unreadable=skip"):
            modules(root)
        (tmp_path / "exclude.txt").write_text(keys[4] + "\n")
        data = modules(root, unreadable="skip", exclude=str(tmp_path / "exclude.txt"))
        left = [key for place, key in enumerate(keys) if place not in (1, 2, 4)]
        assert list(data.train_set.source.keys) == list(data.train_set.rejected.source.keys) == left
        assert len(data.skipped) == 2
        for place, key in enumerate(left):
            files = [root / name for name in key.split(" > ")]
            sources = (data.train_set.source, data.train_set.rejected.source)
            for file, source in zip(files, sources, strict=True):
                assert np.array_equal(source[place].image_HWC, np.asarray(Image.open(file)))
        (tmp_path / "exclude.txt").write_text("nothing\n")
        with pytest.raises(UserError, match=r"data\.exclude=.*names images that are not here"):
            modules(root, exclude=str(tmp_path / "exclude.txt"))

    def test_what_a_resumed_run_would_not_have_is_told(self, root: Path) -> None:
        """Also when only a rejected picture was edited, and when the two have changed places."""
        before = modules(root)._inventory
        assert modules(root)._inventory.changes_since(before) == []
        key = before.keys[0]
        one, other = (root / name for name in key.split(" > "))
        kept = one.read_bytes(), other.read_bytes()
        picture(other, 999, (48, 48))
        assert modules(root)._inventory.changes_since(before) == [f"1 edited ({key})"]
        one.write_bytes(kept[1])
        other.write_bytes(kept[0])
        assert modules(root)._inventory.changes_since(before) == [f"1 edited ({key})"]

    def test_toy_scenes_are_the_same_in_both_looks(self) -> None:
        pairs = ToyPairs("photo", "plain", 3, "train")
        assert list(pairs.keys) == list(pairs.rejected.keys)
        assert pairs[1].caption == pairs.rejected[1].caption
        assert not np.array_equal(pairs[1].image_HWC, pairs.rejected[1].image_HWC)
        with pytest.raises(UserError, match="must be two looks"):
            ToyPairs("photo", "photo", 3, "train")

    def test_pairs_with_another_loss_are_refused(self) -> None:
        data = Pairs(ToyPairs("photo", "plain", 2, "train"), ToyPairs("photo", "plain", 1, "validation"), 1, 64)
        with pytest.raises(UserError, match="pairs of pictures are for objective=preference"):
            refuse_unpaired(Denoising(), data)
        refuse_unpaired(Preference(), data)


SUBJECTS = {"base": 0, "tuned": 50}
PROMPTS = ("a red cat", "the dog, on a table")
EXPORT = """
const fs = require("fs");
const [page, scripts, given] = process.argv.slice(1);
const results = JSON.parse(fs.readFileSync(page, "utf8").match(/id="results">(.*?)<\\/script>/s)[1]);
const code = ["bradley_terry", "vote"].map((name) => fs.readFileSync(`${scripts}/${name}.js`, "utf8")).join("\\n");
const storage = {getItem: () => given, setItem: () => {}};
const run = new Function("results", "subjects", "localStorage", `${code}; return exported();`);
const subjects = new Map(results.subjects.map((subject) => [subject.name, subject]));
console.log(JSON.stringify(run(results, subjects, storage)));
"""


@pytest.fixture
def vote(tmp_path: Path) -> Callable[..., Path]:
    """Writes a report, and what its page exports after these votes: (left, right, choice) by number of picture."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    report = tmp_path / "comparison"
    pictures = []
    for subject, first in SUBJECTS.items():
        for number, prompt in enumerate(PROMPTS * 4):
            path = f"pictures/{subject}-{number}.png"
            picture(report / path, first + number, (32, 32))
            pictures.append(ImageResult(subject, {"prompt": prompt, "seed": number // 2}, path, {"prompt": prompt}))
    subjects = [SubjectSummary("base", "model", "nano"), SubjectSummary("tuned", "LoRA", "runs/x")]
    write_page(report / "report.html", Results("a vote", {}, {"prompt": PROMPTS}, subjects, [], pictures))

    def export(*votes: tuple[int, int, str], to: str = "comparison/votes.json") -> Path:
        given = [dict(zip(("left", "right", "choice"), each, strict=True)) for each in votes]
        words = [node, "-e", EXPORT, str(report / "report.html"), str(PAGE), json.dumps(given)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        file = tmp_path / to
        file.write_text(done.stdout, encoding="utf-8")
        return file

    return export


class TestVotes:
    def test_a_vote_of_the_page_becomes_pairs_and_a_step(self, vote, tiny_model) -> None:
        """Pictures 0 to 7 are of the base, 8 to 15 of the tuned model, and i and i + 8 have one prompt and seed."""
        file = vote((0, 8, "right"), (9, 1, "right"), (2, 10, "tie"), (11, 3, "left"), (4, 12, "skip"), (5, 13, "tie"))
        pairs = Votes(str(file), "all")
        assert list(pairs.keys) == [
            "pictures/tuned-0.png > pictures/base-0.png",
            "pictures/base-1.png > pictures/tuned-1.png",
            "pictures/tuned-3.png > pictures/base-3.png",
        ]
        assert [pairs[i].caption for i in range(3)] == [PROMPTS[0], PROMPTS[1], PROMPTS[1]]
        assert pairs.left_out == ["1 x a vote that was skipped", "2 x no preference in a vote"]

        data = pair_datamodule.votes(votes=str(file), batch_size=2, size=32, held_out=0.3, cache="off")
        assert data.left_out == pairs.left_out
        objective = Preference(beta=100.0)
        module = Finetuning(tiny_model(), Adapter(rank=2), objective, partial(adamw, lr=1e-2), constant, seed=0)
        batch = collate([data.train_set[index, 0] for index in range(2)])
        optimizer, losses = module.build_optimizer(), []
        for _ in range(4):
            optimizer.zero_grad()
            loss = module.training_step(batch, 0)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(0.693147, abs=1e-6)
        assert losses[-1] < losses[0] - 0.01

    def test_the_pictures_may_be_elsewhere_and_votes_of_several(self, vote, tmp_path: Path) -> None:
        one = vote((0, 8, "left"), (1, 9, "left"), to="mine.json")
        other = vote((0, 8, "left"), to="yours.json")
        with pytest.raises(UserError) as caught:
            Votes(str(one), "train")
        assert f"{one} vote 1 names pictures/base-0.png, which is not in {tmp_path}" in str(caught.value)
        assert "vote 2 names pictures/base-1.png" in str(caught.value)
        assert "set data.run to the folder of the report" in str(caught.value)
        keys = list(Votes([str(one), str(other)], "all", run=str(tmp_path / "comparison")).keys)
        assert keys[::2] == [
            "pictures/base-0.png > pictures/tuned-0.png",
            "pictures/base-0.png > pictures/tuned-0.png#1",
        ]

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            ("{}", "is not an export of a vote"),
            ('{"votes": [3]}', "is not an export of a vote"),
            ("[", "is not JSON"),
            ('{"votes": []}', "no pair with a preference"),
            ('{"votes": [{"choice": "both"}]}', "vote 1 has the choice 'both', which is none"),
            ('{"votes": [{"choice": "left"}]}', "vote 1 has no path of a picture as 'chosen'"),
            ('{"votes": [{"choice": "left", "left": 3, "right": {"path": "x"}}]}', "vote 1 has no path of a picture"),
        ],
    )
    def test_a_file_that_is_no_vote(self, content: str, problem: str, tmp_path: Path) -> None:
        (tmp_path / "votes.json").write_text(content)
        with pytest.raises(UserError, match=rf"^data\.votes: .*{problem}"):
            Votes(str(tmp_path / "votes.json"), "train")
        with pytest.raises(UserError, match="cannot be read"):
            Votes(str(tmp_path / "none.json"), "train")


@dataclass
class Learning(Run):
    """A run of the tiny model on pairs; it goes on from its last checkpoint, if it has one."""

    root: Path = Path()
    options: dict = field(default_factory=dict)


def learn(run: Learning) -> tuple[dict[str, torch.Tensor], dict]:
    """The trained weights and the last checkpoint."""
    torch.set_num_threads(1)

    def module() -> Finetuning:
        optimizer = partial(adamw, lr=1e-2, eps=1e-4)
        return Finetuning(build_tiny_model(), TUNINGS[run.tuning](), Preference(beta=50.0), optimizer, constant, seed=7)

    given = {"flip": True, "bucket_step": 16, "size": 64, "caption_dropout": 0.5} | run.options
    strategies = {"one": lambda: "auto", "ddp": ddp, "fsdp": fsdp}
    fit = trainer(
        max_steps=run.max_steps,
        validate_every=2,
        accumulate_grad_batches=run.accumulate,
        accelerator="cpu",
        devices=int(os.environ.get("WORLD_SIZE", "1")),
        strategy=strategies[run.strategy](),
        precision="32-true",
        progress_bar=False,
        callbacks=[last_checkpoint(str(run.folder), every=2)],
        run_dir=str(run.folder),
    )
    trained = module()
    resume = run.last if run.last.is_file() else None
    fit.fit(trained, modules(run.root, batch_size=run.batch_size, **given), ckpt_path=resume, weights_only=False)
    assert fit.callback_metrics["val/eps_mse"] > 0
    if run.strategy == "fsdp":
        trained = fit.strategy.gather(trained, module)
    weights = {name: p.detach().clone() for name, p in trainable_parameters(trained.model)}
    return weights, read_state(run.last) if run.strategy == "one" else {}


@pytest.mark.parametrize(("tuning", "cache"), [("full", "ram"), ("lora_unet", "off")])
def test_a_resumed_run_ends_with_the_same_bits(tuning: str, cache: str, root: Path, tmp_path: Path) -> None:
    """Four steps at once, and two and two; with buckets, flips, dropped captions and a worker."""
    given = {"tuning": tuning, "root": root, "options": {"cache": cache, "num_workers": 1}}
    whole, state = learn(Learning(tmp_path / "whole", max_steps=4, **given))
    learn(Learning(tmp_path / "parts", max_steps=2, **given))
    parts, resumed = learn(Learning(tmp_path / "parts", max_steps=4, **given))
    assert_equal(parts, whole, "weights")
    for name in ("state_dict", "optimizer_states", "Pairs"):
        assert_equal(resumed[name], state[name], name)
    start = dict(trainable_parameters(build_tiny_model()))
    assert tuning != "full" or any(not torch.equal(weight, start[name]) for name, weight in whole.items())


@pytest.mark.parametrize("tuning", ["full", "lora_unet"])
def test_a_step_does_not_depend_on_how_it_is_split(tuning: str, root: Path, tmp_path: Path) -> None:
    """Batches of four pairs, and two of two; with dropout of the LoRA."""
    whole, _ = learn(Learning(tmp_path / "whole", tuning=tuning, root=root, max_steps=3, batch_size=4))
    split, _ = learn(Learning(tmp_path / "split", tuning=tuning, root=root, max_steps=3, batch_size=2, accumulate=2))
    for name, weight in whole.items():
        torch.testing.assert_close(split[name], weight, rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("tuning", ["full", "lora_unet"])
def test_two_ranks_learn_what_one_does(tuning: str, strategy: str, root: Path, tmp_path: Path) -> None:
    """Batches of four pairs, and two on each of two ranks, which shard the weights or keep copies of them."""
    whole, _ = learn(Learning(tmp_path / "whole", tuning=tuning, root=root, max_steps=3, batch_size=4))
    run = Learning(tmp_path / "ranks", tuning=tuning, root=root, max_steps=3, batch_size=2, strategy=strategy)
    assert finish(start(run, 2, function=learn), 250) == [0, 0]
    ranks, _ = torch.load(run.folder / "result_0.pt", weights_only=False)
    for name, weight in whole.items():
        torch.testing.assert_close(ranks[name], weight, rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora_unet"])
def test_train_py_on_the_pairs_of_a_folder(tuning: str, root: Path, tmp_path: Path) -> None:
    """With nano, and the verdict; and the same command on data without pairs is refused before anything is loaded."""
    words = [
        "objective=preference", "verdict=preference", "verdict.num_images=2", "logger=csv", "data.batch_size=2",
        "trainer.progress_bar=false", "~callbacks.previews", "trainer.max_steps=2", "sampler.steps=2",
        f"tuning={tuning}", "verdict.prompts=[a cat]",
    ]  # fmt: skip
    run = Run(tmp_path / "run")
    words_of_pairs = [*words, "data=preference", f"data.root={root}"]
    assert finish(start(run, function=partial(train_py, words_of_pairs)), 250) == [0]
    summary = json.loads((run.folder / "summary.json").read_text())
    assert {"win_rate", "judge_accuracy", "adherence", "val/eps_mse"} <= summary.keys()
