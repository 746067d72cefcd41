"""A metric from outside the package: chosen by config, measured, shown; left out if its inputs are missing."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import sdft.evaluation.__main__ as evaluation
from sdft.config.command import check, compose
from sdft.errors import UserError
from sdft.evaluation.comparison import Comparison, measure
from sdft.evaluation.image_cache import ImageFiles
from sdft.evaluation.metrics.protocol import GeneratedImages, MetricInputs
from sdft.evaluation.results import Estimate, MetricInfo
from sdft.evaluation.subjects import Subject
from sdft.models.load import pretrained
from sdft.sampling.samplers import Sampler


class MeanRed:
    """One value per image, with an option."""

    needs = ()

    def __init__(self, scale: float = 1.0):
        self.scale = scale
        self.info = MetricInfo("mean_red", "mean red", better="higher", meaning="Mean of the red channel.")

    def __call__(self, generated: GeneratedImages, inputs: MetricInputs) -> np.ndarray:
        return np.array([self.scale * image[..., 0].mean() for image in generated.images])


class RedGap:
    """One estimate of the set, against reference images."""

    info = MetricInfo("red_gap", "red gap", better="lower", meaning="Distance to the reference's mean red.")
    needs = ("reference",)

    def __call__(self, generated: GeneratedImages, inputs: MetricInputs) -> Estimate:
        raise AssertionError("called without its inputs")


class Wrong:
    """Returns what it is given."""

    info = MetricInfo("wrong", "wrong", better=None, meaning="")
    needs = ()

    def __init__(self, returned: object):
        self.returned = returned

    def __call__(self, generated: GeneratedImages, inputs: MetricInputs):
        return self.returned


@pytest.fixture
def my_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The import path of this module."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return Path(__file__).stem


def test_a_metric_of_another_package_is_measured_and_shown(
    my_lab: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    overrides = [
        "subjects={base: nano, again: nano}",
        "metrics=[]",
        f"+metrics.mean_red={{_target_: {my_lab}.MeanRed, scale: 2.0}}",
        f"+metrics.red_gap={{_target_: {my_lab}.RedGap}}",
        "prompts=[a photo of a cat, a red car]",
        "sampler.steps=1",
        "size=32",
        f"run_dir={out}",
    ]
    monkeypatch.setattr(sys, "argv", ["eval.py", *overrides])
    evaluation.main()
    printed = capsys.readouterr().out
    assert "not measured: red_gap (reference=null)" in printed
    assert "mean red ↑" in printed
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    rows = list(csv.DictReader((out / "results.csv").open(encoding="utf-8", newline="")))
    values = [float(row["mean_red"]) for row in rows if row["subject"] == "base"]
    assert results["metrics"] == [
        {"name": "mean_red", "label": "mean red", "better": "higher", "meaning": "Mean of the red channel."}
    ]
    assert results["figures"]["base"]["mean_red"]["value"] == pytest.approx(np.mean(values))
    assert [verdict["metric"] for verdict in results["verdicts"]] == ["mean_red"]
    (image,) = ImageFiles([out / rows[0]["path"]])
    assert values[0] == pytest.approx(2 * image[..., 0].mean())
    page = (out / "report.html").read_text(encoding="utf-8")
    (text,) = re.findall(r'<script type="application/json" id="results">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text)
    assert data["metrics"][0]["label"] == "mean red"
    assert data["pictures"][0]["figures"] == {"mean_red": values[0]}


def test_a_wrong_option_of_such_a_metric_is_reported_before_anything_loads(my_lab: str) -> None:
    metric = f"+metrics.mean_red={{_target_: {my_lab}.MeanRed, scal: 2.0}}"
    with pytest.raises(UserError, match=r"'metrics\.mean_red\.scal'.*did you mean 'metrics\.mean_red\.scale'"):
        check(compose("eval", ["subjects={base: nano}", metric]))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.zeros(3), r"returned an array of shape \(3,\) for 2 images"),
        ([1.0, 2.0], "returned list for 2 images; return an array of shape"),
    ],
)
def test_a_metric_that_returns_something_else_is_named(returned: object, message: str, tmp_path: Path) -> None:
    comparison = Comparison(pretrained, ["a", "b"], Sampler(), str(tmp_path), {"base": "nano"})
    cells = comparison.build_grid([Subject("base", "nano", weights="nano")])
    generated = GeneratedImages("base", cells, [], None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"^metrics\.wrong \(Wrong\) {message}"):
        measure(comparison, [generated], "base", MetricInputs(), [Wrong(returned)])


def test_an_unknown_need_is_named() -> None:
    with pytest.raises(UserError, match="needs 'refrence', which does not exist; choose from judge, reference"):
        MetricInputs().missing(["refrence"])  # type: ignore[list-item]
