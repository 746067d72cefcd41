"""From what was generated to verdicts, a recommendation, tables, and the maps of a sweep."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdft.errors import UserError
from sdft.evaluation.comparison import Comparison, measure, recommend
from sdft.evaluation.grid import Axes
from sdft.evaluation.image_cache import ImageFiles, write_image
from sdft.evaluation.metrics.pixels import Colourfulness
from sdft.evaluation.metrics.protocol import GeneratedImages, MetricInputs
from sdft.evaluation.results import Estimate, MetricInfo, SubjectSummary, Verdict
from sdft.evaluation.statistics import Difference
from sdft.evaluation.subjects import Subject
from sdft.evaluation.sweeps import Job, average_repeats, heat_maps, job_subjects, training_values
from sdft.evaluation.tables import terminal_table, write_contact_sheet, write_tables
from sdft.evaluation.tradeoff import find_tradeoff, pareto_front
from sdft.evaluation.verdicts import sentence
from sdft.models.load import pretrained
from sdft.sampling.samplers import Sampler

ALERT = '<script>alert("1")</script>, кот 🐈'
PROMPTS = [ALERT, "b", "c", "d", "e", "f", "g", "h"]
X = MetricInfo("x", "keeping", "higher", "")
Y = MetricInfo("y", "distance", "lower", "")


class Brightness:
    """Higher is better, so that verdicts have a direction."""

    info = MetricInfo("brightness", "brightness", "higher", "Mean of the bytes.")
    needs = ()

    def __call__(self, generated: GeneratedImages, inputs: MetricInputs) -> np.ndarray:
        return np.array([float(image.mean()) for image in generated.images])


def compared(folder: Path, shifts: dict[str, float]):
    """Subjects whose pictures are brighter by so much, each under noise of its own."""
    comparison = Comparison(pretrained, PROMPTS, Sampler(steps=2), str(folder), {"base": "nano"}, seeds=2)
    subjects = [Subject(name, "nano", "nano") for name in shifts]
    generated, random = [], np.random.default_rng(0)
    for name in shifts:
        own = [cell for cell in comparison.build_grid(subjects) if cell.variant == name]
        paths = []
        for i in range(len(own)):
            image = 100 + 10 * (i // 2) + shifts[name] + random.normal(0, 2) + np.zeros((32, 32, 3))
            paths.append(folder / "pictures" / f"{name}{i}.png")
            write_image(paths[-1], image.round().astype(np.uint8))
        generated.append(GeneratedImages(name, own, ImageFiles(paths), None))
    metrics = [Brightness(), Colourfulness()]
    return comparison, generated, measure(comparison, generated, "base", MetricInputs(), metrics)


def test_verdicts_say_what_differs_and_what_could_not_be_seen(tmp_path: Path) -> None:
    _, _, results = compared(tmp_path, {"base": 0, "same": 0, "brighter": 9, "darker": -9})
    test = {v.subject: v for v in results.verdicts if v.metric == "brightness"}
    assert test["brighter"].p < 0.05 > test["darker"].p
    assert test["same"].p > 0.05
    assert test["brighter"].num_pairs == 16
    assert "higher than base's, which is better" in test["brighter"].sentence
    assert "lower than base's, which is worse" in test["darker"].sentence
    assert test["same"].sentence == (
        f"same: no detectable difference from base in brightness over 16 pairs of 8 prompts (p = {test['same'].p:.2g});"
        f" a difference of {test['same'].detectable:.2g} would have been detected."
    )
    assert 1 < test["same"].detectable < 9
    assert test["brighter"].difference.low < 9 + 2 and test["brighter"].difference.high > 9 - 2  # noqa: PT018
    assert results.figures["base"]["brightness"].value == pytest.approx(135, abs=2)


def test_few_pairs_are_said_to_be_few() -> None:
    asked = Comparison(pretrained, ["a"], Sampler(), "x", {"a": "nano"})
    one = GeneratedImages("mine", asked.build_grid([Subject("mine", "")]), [], None)
    few = Difference(Estimate(1.0), 1.0, 0.0, float("inf"), 1)
    assert sentence(one, "base", X, few, 1.0, 1) == (
        "mine: 1 pair cannot show a difference in keeping; generate at least 6 (seeds= or prompts=)."
    )
    none = Difference(Estimate(0.0, 0.0, 0.0), 1.0, 0.0, 0.0, 8)
    assert sentence(one, "base", X, none, 1.0, 8) == "mine: keeping is the same as base's in all 8 pairs."


def test_tables_hold_everything_and_the_sheet_shows_it(tmp_path: Path) -> None:
    _, _, results = compared(tmp_path, {"base": 0, "same": 0})
    written = write_tables(tmp_path, results)
    lines = list(csv.DictReader((tmp_path / "results.csv").open(encoding="utf-8", newline="")))
    assert len(lines) == 32
    assert lines[0]["prompt"] == ALERT
    assert float(lines[0]["brightness"]) == results.pictures[0].figures["brightness"]
    assert (tmp_path / lines[0]["path"]).is_file()
    saved = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert saved["figures"]["base"]["brightness"]["value"] == results.figures["base"]["brightness"].value
    if written[-1].suffix == ".parquet":
        import pyarrow.parquet

        assert pyarrow.parquet.read_table(written[-1]).column("prompt").to_pylist()[0] == ALERT
    write_contact_sheet(tmp_path / "grid.png", results)
    assert Image.open(tmp_path / "grid.png").height > 2 * 128
    assert "same" in terminal_table(results)


def estimates(**points: tuple[float, float]) -> dict[str, dict[str, Estimate]]:
    return {name: {"x": Estimate(x), "y": Estimate(y)} for name, (x, y) in points.items()}


def verdict(subject: str, difference: float, p: float) -> Verdict:
    return Verdict(subject, "base", "x", Estimate(difference), p, 0.0, 0.1, 8, "")


def test_the_front_and_the_recommendation_by_hand() -> None:
    """`bold` is nearest but loses x; `mild` gains without a loss; `bad` is beaten by mild in both."""
    figures = estimates(base=(1.0, 9.0), mild=(0.98, 4.0), bold=(0.5, 1.0), bad=(0.9, 5.0))
    assert pareto_front({"a": (1, 1), "b": (2, 0), "c": (0, 0), "d": (1, 1)}) == ["a", "b", "d"]
    seen = [verdict("mild", -0.02, 0.8), verdict("bold", -0.5, 0.001), verdict("bad", -0.1, 0.3)]
    found = find_tradeoff(figures, X, Y, seen, "base")
    assert found.front == ["base", "mild", "bold"]
    assert found.recommended == "mild"
    assert "no detectable loss in keeping, where 0.1 would have been detected" in found.reason
    all_lose = find_tradeoff(figures, X, Y, [verdict(name, -0.5, 0.001) for name in ("mild", "bold", "bad")], "base")
    assert all_lose.recommended == "mild"
    assert "best balance" in all_lose.reason
    nobody = find_tradeoff(estimates(base=(1.0, 1.0), worse=(1.0, 2.0)), X, Y, [], "base")
    assert nobody.recommended == "base"
    assert find_tradeoff(estimates(base=(1.0, 1.0)), X, Y, [], "base") is None


def test_without_a_second_metric_the_reason_for_no_recommendation_is_given(tmp_path: Path) -> None:
    comparison, _, results = compared(tmp_path, {"base": 0, "same": 0})
    found, why = recommend(comparison, results, "base")
    assert found is None
    assert "needs two of adherence, style_distance" in why


def sweep(folder: Path) -> list[Job]:
    """rank x lr with two seeds each; one job did not finish."""
    jobs = []
    for rank in (4, 8):
        for lr in ("1e-3", "3e-3"):
            for seed in (0, 1):
                job = folder / str(len(jobs))
                job.mkdir()
                (job / "lora.safetensors").write_bytes(b"12345")
                gain = rank / 10 + float(lr) * 100 + seed * 0.02
                summary = {"artifacts": {"lora": "lora.safetensors"}, "train_seconds": 60 * rank, "style_gain": gain,
                           "num_trained_parameters": 1000 * rank}  # fmt: skip
                (job / "summary.json").write_text(json.dumps(summary))
                values = {"rank": str(rank), "optimizer.lr": lr, "seed": str(seed), "experiment": "dreamy_style"}
                jobs.append(Job(job, values, summary))
    return [*jobs, Job(folder / "lost", {"rank": "16"}, {})]


def test_a_sweep_is_a_comparison_of_its_jobs(tmp_path: Path) -> None:
    jobs = sweep(tmp_path)
    subjects = job_subjects(jobs)
    assert [s.name for s in subjects[:3]] == ["rank 4, lr 0.001, seed 0", "rank 4, lr 0.001, seed 1",
                                              "rank 4, lr 0.003, seed 0"]  # fmt: skip
    assert subjects[0].varied == {"rank": 4, "lr": 0.001, "seed": 0}
    assert subjects[0].cost == {"seconds": 240.0, "parameters": 4000.0, "bytes": 5.0}
    summaries = [SubjectSummary("base", "model", "nano")]
    summaries += [SubjectSummary(s.name, s.kind, s.source, s.varied) for s in subjects]
    gain = MetricInfo("style_gain", "style gain", "higher", "")
    (found,) = heat_maps(summaries, [gain], training_values(jobs, subjects))
    assert (found.row_name, found.column_name) == ("rank", "lr")
    assert list(found.cells) == [(4, 0.001), (4, 0.003), (8, 0.001), (8, 0.003)]
    cell = found.cells[4, 0.001]
    assert cell.value == pytest.approx(0.51)
    # t(1) at 97.5 % is 12.7; the deviation of 0.50 and 0.52 is 0.0141, over the root of 2: 0.01
    assert cell.high - cell.value == pytest.approx(12.706 * 0.01, rel=1e-3)
    assert average_repeats([Estimate(1.0, 0.5, 1.5)]) == Estimate(1.0, 0.5, 1.5)
    with pytest.raises(UserError, match="no job has finished"):
        job_subjects(jobs[-1:])


def test_what_to_compare_is_said_once() -> None:
    for given in ({}, {"subjects": {"a": "nano"}, "sweep": "somewhere"}):
        with pytest.raises(UserError, match=r"say what to compare: subjects=.* or sweep="):
            Comparison(pretrained, ["a"], Sampler(), "x", **given)
    with pytest.raises(UserError, match="baseline=b: is none of the subjects"):
        Comparison(pretrained, ["a"], Sampler(), "x", {"a": "nano"}, baseline="b").read_subjects()
    assert Axes().values == {}
