"""The headline of a comparison: what a person would say, and no more than the statistics give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from sdft.evaluation.headline import headline, joined, rounded
from sdft.evaluation.results import Estimate, ImageResult, MetricInfo, Results, SubjectSummary, Verdict
from sdft.evaluation.statistics import compare, detectable, estimate, holm, needed_units
from sdft.evaluation.tradeoff import find_tradeoff

STYLE = MetricInfo("style_distance", "style distance", "lower", "")
ADHERENCE = MetricInfo("adherence", "prompt adherence", "higher", "")
DIVERSITY = MetricInfo("diversity", "diversity", "higher", "")
SHARPNESS = MetricInfo("sharpness", "sharpness", None, "")
FRONT = ["adherence", "style_distance", "style_gain"]


def results(
    style: Mapping[str, tuple[float, float]] | None = None,
    adherence: Mapping[str, Sequence[float]] | None = None,
    prompts: int = 12,
    seeds: int = 1,
    others: Sequence[MetricInfo] = (),
) -> Results:
    """A comparison with `base`. style: value and half of its interval. adherence: of each prompt and seed."""
    metrics = [*([STYLE] if style else []), *([ADHERENCE] if adherence else []), *others]
    names = list(style or adherence or {})
    figures: dict[str, dict[str, Estimate]] = {name: {} for name in names}
    verdicts: list[Verdict] = []
    units = [f"prompt {n}" for n in range(prompts) for _ in range(seeds)] if prompts >= 6 else range(prompts * seeds)
    for name, (value, half) in (style or {}).items():
        figures[name]["style_distance"] = Estimate(value, value - half, value + half)
    for name, values in (adherence or {}).items():
        figures[name]["adherence"] = estimate(np.array(values), list(units)) or Estimate(0.0)
    found = [
        (name, compare(np.array(values), np.array(adherence["base"]), list(units), len(names) - 1))
        for name, values in (adherence or {}).items()
        if name != "base"
    ]
    for (name, d), p in zip(found, holm([d.p for _, d in found if d]) if found else [], strict=True):
        assert d is not None
        verdicts.append(Verdict(name, "base", "adherence", d.difference, p, d.effect, d.detectable, len(units), ""))
    tradeoff = find_tradeoff(figures, ADHERENCE, STYLE, verdicts, "base") if style and adherence else None
    axes = {"prompt": [f"prompt {n}" for n in range(prompts)], "seed": list(range(seeds))}
    pictures = [ImageResult(name, {}, "", {}) for name in names for _ in range(prompts * seeds)]
    subjects = [SubjectSummary(name, "LoRA", "") for name in names]
    return Results("", {}, axes, subjects, metrics, pictures, figures, verdicts, tradeoff)


def noise(mean: float, num: int = 12, spread: float = 0.02, seed: int = 0) -> list[float]:
    return (mean + spread * np.random.default_rng(seed).standard_normal(num)).tolist()


def said(found: Results, front: Sequence[str] = FRONT) -> str:
    return headline(found, "base", front).sentence


FAR, NEAR, NEARER = (1.1, 0.05), (0.62, 0.07), (0.4, 0.05)
EQUAL = {"base": noise(0.3), "dreamy": noise(0.3, seed=1)}
LESS = {"base": noise(0.3), "dreamy": noise(0.2, seed=1)}
MORE = {"base": noise(0.3), "dreamy": noise(0.4, seed=1)}
NUMBERS = "style distance 0.62, 95 % interval 0.55 to 0.69; base 1.1"


def test_two_subjects_of_which_one_gains_at_no_cost() -> None:
    found = results({"base": FAR, "dreamy": NEAR}, EQUAL)
    assert said(found) == f"Keep dreamy: closer to the look than base ({NUMBERS}) and as faithful to the prompts."
    assert "would have been detected" in headline(found, "base", FRONT).detail


def test_two_subjects_of_which_one_is_better_in_both() -> None:
    found = said(results({"base": FAR, "dreamy": NEAR}, MORE))
    assert found == f"Keep dreamy: closer to the look than base ({NUMBERS}) and more faithful to the prompts."


def test_a_gain_that_costs_is_a_tradeoff_and_no_recommendation() -> None:
    found = said(results({"base": FAR, "dreamy": NEAR}, LESS))
    assert found.startswith(f"dreamy is closer to the look than base ({NUMBERS}) but less faithful to the prompts (by ")
    assert found.endswith("; which to keep depends on what matters more.")
    reverse = said(results({"base": NEAR, "dreamy": FAR}, MORE))
    assert reverse.startswith("dreamy is more faithful to the prompts than base (")
    assert reverse.endswith("), but further from the look.")


def test_a_subject_that_only_loses() -> None:
    found = said(results({"base": NEAR, "dreamy": FAR}, LESS))
    assert found.startswith(
        "Keep base: dreamy is further from the look and less faithful to the prompts (style distance"
    )
    found = said(results({"base": NEAR, "dreamy": (0.6, 0.07)}, LESS))
    assert found == "Keep base: dreamy is less faithful to the prompts."


def test_more_faithful_and_as_close() -> None:
    found = said(results({"base": NEAR, "dreamy": (0.6, 0.07)}, MORE))
    assert found.startswith("Keep dreamy: more faithful to the prompts than base (by 0.1, 95 % interval 0.0")
    assert found.endswith(") and as close to the look.")


def test_the_closest_forgets_and_another_keeps_both() -> None:
    adherence = {"base": noise(0.3), "dreamy": noise(0.2, seed=1), "blend": noise(0.3, seed=2)}
    found = results({"base": FAR, "dreamy": NEARER, "blend": NEAR}, adherence)
    assert said(found) == (
        "dreamy is closest to the look but less faithful to the prompts than base; keep blend: closer to the look than "
        f"base ({NUMBERS}) and as faithful to the prompts."
    )
    assert found.tradeoff is not None
    assert found.tradeoff.recommended == "blend"


def test_the_best_of_several_and_one_that_cannot_be_told_from_it() -> None:
    adherence = {name: noise(0.3, seed=seed) for seed, name in enumerate(("base", "one", "two"))}
    alone = said(results({"base": FAR, "one": NEAR, "two": NEARER}, adherence))
    assert alone.startswith("Keep two: closest to the look (style distance 0.4")
    assert alone.endswith(") and as faithful to the prompts as base.")
    both = said(results({"base": FAR, "one": NEAR, "two": (0.6, 0.07)}, adherence))
    assert both.startswith("Keep two: closer to the look than base (")
    assert both.endswith("; these images cannot tell it from one.")


def test_every_gain_costs_and_a_balance_is_named() -> None:
    adherence = {"base": noise(0.3), "one": noise(0.1, seed=1), "two": noise(0.22, seed=2)}
    found = results({"base": FAR, "one": NEARER, "two": NEAR}, adherence)
    text = said(found)
    assert text.startswith("one is closest to the look (")
    assert "but less faithful to the prompts than base (by 0.2" in text
    assert text.endswith("; two is the best balance.")
    adherence["two"] = noise(0.3, seed=2)
    unclear = said(results({"base": FAR, "one": NEARER, "two": (1.05, 0.07)}, adherence))
    assert unclear.endswith("; two may keep both, which these images cannot tell.")


def test_nothing_can_be_told_and_how_many_would_do() -> None:
    """The number is that with which the test of the same difference has its power."""
    values = noise(0.0, 12, 0.05, seed=5)
    d = np.array(values) - np.mean(values) + 0.02
    adherence = {"base": [0.3] * 12, "dreamy": (0.3 + d).tolist()}
    text = said(results({"base": FAR, "dreamy": (1.08, 0.06)}, adherence))
    assert text.startswith("These 12 images of each cannot tell dreamy from base; draw about ")
    number = int(text.split("about ")[1].split()[0])
    assert text.endswith(" prompts.")
    assert detectable(float(d.std(ddof=1)), number) <= 0.02 <= detectable(float(d.std(ddof=1)), number // 2)


def test_with_few_prompts_seeds_are_drawn() -> None:
    d = noise(0.0, 12, 0.05, seed=5)
    d = (np.array(d) - np.mean(d) + 0.02).tolist()
    adherence = {"base": [0.3] * 12, "dreamy": [0.3 + one for one in d]}
    text = said(results(None, adherence, prompts=3, seeds=4))
    assert text.startswith("These 12 images of each cannot tell dreamy from base; draw about ")
    assert text.endswith(" seeds.")
    few = said(results(None, {"base": [0.3, 0.31, 0.29], "dreamy": [0.5, 0.52, 0.6]}, prompts=3))
    assert few == "These 3 images of each cannot tell dreamy from base; draw at least 2 seeds, or 6 prompts."


def test_ties_and_differences_too_small_to_matter() -> None:
    same = said(results(None, {"base": noise(0.3), "dreamy": noise(0.3)}))
    assert same == "These 12 images of each cannot tell dreamy from base: they are the same in prompt adherence."
    tied = [0.3] * 10 + [0.31, 0.2898]
    small = said(results(None, {"base": [0.3] * 12, "dreamy": tied}))
    assert small.endswith("cannot tell dreamy from base: they are alike, or nearly so.")


def test_adherence_alone_says_what_is_missing() -> None:
    found = results(None, LESS)
    assert said(found) == "Keep base: dreamy is less faithful to the prompts (" + said(found).split("(", 1)[1]
    assert headline(found, "base", FRONT).detail == "The look was not measured; reference= gives images of it."
    found = results({"base": FAR, "dreamy": NEAR})
    assert said(found) == f"Keep dreamy: closer to the look than base ({NUMBERS})."
    assert headline(found, "base", FRONT).detail.startswith("Whether prompts are followed was not measured")


def test_some_are_worse_and_others_cannot_be_told() -> None:
    adherence = {"base": noise(0.3), "one": noise(0.1, seed=1), "two": noise(0.3, seed=2)}
    text = said(results({"base": NEAR, "one": FAR, "two": (0.63, 0.07)}, adherence))
    assert text.startswith("These 12 images of each cannot tell two from base, and one is worse: they are alike")


def test_one_subject_and_no_metric() -> None:
    found = results({"base": FAR}, {"base": noise(0.3)})
    assert said(found).startswith("base alone: prompt adherence 0.3 (95 % interval")
    plain = results({"base": FAR, "dreamy": NEAR})
    plain = Results("", {}, plain.axes, plain.subjects, [SHARPNESS], plain.pictures)
    assert said(plain).startswith("24 images of 2 subjects: nothing measured says which is better")


def test_another_metric_is_called_by_its_label() -> None:
    found = results({"base": FAR, "dreamy": NEAR})
    figures = {"base": {"own": Estimate(1.0, 0.9, 1.1)}, "dreamy": {"own": Estimate(2.0, 1.9, 2.1)}}
    own = Results(
        "", {}, found.axes, found.subjects, [MetricInfo("own", "glow", "higher", "")], found.pictures, figures
    )
    assert said(own) == "Keep dreamy: better in glow than base (glow 2, 95 % interval 1.9 to 2.1; base 1)."


@pytest.mark.parametrize("effect", [0.2, 0.5, 1.0])
def test_the_needed_units_are_those_that_detect(effect: float) -> None:
    needed = needed_units(effect, 3)
    assert needed is not None
    assert detectable(1.0, round(needed), 3) == pytest.approx(effect, rel=0.1)
    assert needed_units(0.0) is None


def test_lists_and_numbers() -> None:
    assert joined(["a"]) == "a"
    assert joined(["a", "b", "c"], "or") == "a, b or c"
    assert joined(list("abcdefg")) == "a, b, c and 4 more"
    assert [rounded(number) for number in (5.2, 59.1, 137, 1234)] == [6, 60, 140, 1300]
