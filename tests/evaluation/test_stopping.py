"""When a run is stopped by its pictures: planted figures with known noise."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from sdft.evaluation.stopping import Limits, Measurement, StoppingRule, improvement, trend

NUM, NOISE = 12, 0.15
"""Pictures, and standard deviation of their values."""


def measured(step: int, seed: int, **means: float) -> Measurement:
    """A measurement whose pictures scatter around these means: half of the scatter is that of the prompt."""
    of_prompt = np.random.default_rng(seed).normal(size=NUM)
    own = np.random.default_rng([seed, step]).normal(size=NUM)
    scatter = NOISE * (of_prompt + own) / 2**0.5
    return Measurement.of(step, {name: mean + scatter - scatter.mean() * 0.2 for name, mean in means.items()})


def run(seed: int, gains: list[float], **others: list[float]) -> list[Measurement]:
    """The base, and a measurement for each gain."""
    series = {"style_gain": [0.0, *gains]} | {name: values for name, values in others.items()}
    return [
        measured(10 * i, seed, **{name: values[i] for name, values in series.items()}) for i in range(len(gains) + 1)
    ]


def stop_of(history: list[Measurement], rule: StoppingRule) -> tuple[int, str] | None:
    """(measurements, reason) at which the rule ends a run."""
    for length in range(1, len(history) + 1):
        if reason := rule(history[:length]):
            return length - 1, reason
    return None


def test_a_run_that_improves_goes_on() -> None:
    """At most one of 20 runs with clear progress is stopped."""
    gains = [0.1 * n for n in range(1, 11)]
    stopped = [stop_of(run(seed, gains), StoppingRule()) for seed in range(20)]
    assert sum(found is not None for found in stopped) <= 1


def test_a_run_that_no_longer_improves_is_stopped() -> None:
    gains = [0.3, 0.6, 0.8] + [0.8] * 9
    found = [stop_of(run(seed, gains), StoppingRule(patience=3)) for seed in range(20)]
    assert sum(one is not None for one in found) >= 18
    assert all(one[0] >= 5 for one in found if one)  # not before it stood still
    assert "no figure has become better since step" in next(one[1] for one in found if one)


def test_a_run_that_stands_still_goes_on_while_its_rate_will_fall() -> None:
    """Beyond a limit it is stopped all the same."""
    gains = [0.3, 0.6, 0.8] + [0.8] * 9
    falling = [replace(one, rate_to_fall=0.11) for one in run(0, gains)]
    settled = [replace(one, rate_to_fall=0.1) for one in run(0, gains)]
    assert stop_of(settled, StoppingRule(patience=3)) == stop_of(run(0, gains), StoppingRule(patience=3))
    assert stop_of(settled, StoppingRule(patience=3)) is not None
    assert stop_of(falling, StoppingRule(patience=3)) is None
    forgets = [replace(one, rate_to_fall=0.9) for one in run(0, gains, adherence=[1.0, 0.9, *[0.3] * 11])]
    found = stop_of(forgets, StoppingRule())
    assert found is not None
    assert "beyond its limit" in found[1]


def test_a_run_that_forgets_is_stopped_though_it_learns() -> None:
    gains = [0.1 * n for n in range(1, 9)]
    adherence = [1.0, 0.95, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.0]
    for seed in range(10):
        found = stop_of(run(seed, gains, adherence=adherence), StoppingRule())
        assert found is not None
        assert found[0] in (4, 5, 6)
        assert "prompt adherence" in found[1]
        assert "beyond its limit of 0.7" in found[1]


def test_copies_stop_a_run_but_not_where_the_base_is_as_near() -> None:
    gains = [0.1 * n for n in range(1, 9)]
    near = run(0, gains, novelty=[1.3, 1.2, 1.0, 0.8, 0.5, 0.2, 0.1, 0.1, 0.1])
    found = stop_of(near, StoppingRule())
    assert found is not None
    assert "novelty" in found[1]
    assert stop_of(run(0, gains, novelty=[0.4] * 9), StoppingRule()) is None


def test_one_measurement_beyond_a_limit_does_not_stop() -> None:
    gains = [0.1 * n for n in range(1, 9)]
    once = run(0, gains, adherence=[1, 1, 1, 0.2, 1, 1, 1, 1, 1])
    assert stop_of(once, StoppingRule()) is None


def test_limits_are_passed_with_the_whole_interval() -> None:
    of = Measurement.of(10, {"adherence": np.array([0.6, 0.7, 0.8]), "forgetting": np.array([0.5, 0.5, 0.51])})
    assert Limits(adherence=0.75, forgetting=0.3).passed(of) == ["forgetting"]  # 0.45 to 0.95 includes 0.75
    assert Limits(adherence=0.75, forgetting=0.505).passed(of) == []
    assert of.interval("adherence") == (pytest.approx(0.7 - 0.2484, abs=1e-4), pytest.approx(0.7 + 0.2484, abs=1e-4))


def test_improvement_is_paired_and_signed() -> None:
    """Pictures that differ by 2 and change by 0.1: told apart, as the pairs are compared."""
    before = Measurement.of(0, {"adherence": np.arange(8) * 2.0, "forgetting": np.arange(8) * 2.0})
    now = Measurement.of(10, {name: values + 0.1 for name, values in before.values.items()})
    assert improvement(now, before, "adherence") == (pytest.approx(0.1), pytest.approx(2 / 2**8))
    assert improvement(now, before, "forgetting")[0] == pytest.approx(-0.1)


def test_a_trend_counts_all_measurements() -> None:
    """Lines by hand: 0, 2, 1 at the steps 0, 10, 30 has the slope 3/140 = sum((t - 40/3) y) / sum((t - 40/3)^2)."""
    window = [
        Measurement.of(step, {"adherence": np.full(8, value), "forgetting": np.full(8, value)})
        for step, value in ((0, 0.0), (10, 2.0), (30, 1.0))
    ]
    assert trend(window, "adherence") == (pytest.approx(90 / 140, rel=1e-6), pytest.approx(2 / 2**8))
    assert trend(window, "forgetting")[0] == pytest.approx(-90 / 140, rel=1e-6)


def test_a_trend_is_detected_where_the_ends_are_not_told_apart() -> None:
    """The change by the slope of seven measurements has 0.8 of the noise of their ends."""
    gains = [0.1 + 0.02 * n for n in range(7)]
    runs = [run(seed, gains)[1:] for seed in range(40)]
    by_trend = sum(trend(one, "style_gain")[1] < 0.05 for one in runs)
    by_ends = sum(improvement(one[-1], one[0], "style_gain")[1] < 0.05 for one in runs)
    assert by_trend > by_ends + 2
    still = [run(seed, [0.3] * 7)[1:] for seed in range(200)]
    assert sum(trend(one, "style_gain")[1] < 0.05 for one in still) <= 20, "the level is 5 %"


def test_a_measurement_is_read_back_as_written() -> None:
    one = replace(measured(20, 1, style_gain=0.5, adherence=0.9), rate_to_fall=0.25)
    again = Measurement.from_json(json.loads(json.dumps(one.to_json())))
    assert again.step == 20
    assert again.rate_to_fall == 0.25
    assert again.means == one.means
    assert one.to_json()["style_gain"] == pytest.approx(one.values["style_gain"].mean())
