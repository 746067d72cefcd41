"""Which candidate is recommended, and what is said of it."""

from __future__ import annotations

import numpy as np
import pytest

from sdft.choosing.decide import Decision
from sdft.errors import UserError
from sdft.evaluation.stopping import Measurement

NUM = 16


def normal(*seed: int) -> np.ndarray:
    """Values of mean 0."""
    found = np.random.default_rng(seed).normal(size=NUM)
    return found - found.mean()


SCATTER = normal(0)


def measured(step: int, strength: float, noise: float = 0.02, **means: float) -> Measurement:
    """Pictures whose scatter is that of the prompt, the same for all candidates, and a little of their own."""
    own = normal(step, round(10 * strength))
    values = {name: mean + 0.1 * SCATTER + noise * own for name, mean in means.items()}
    return Measurement.of(step, values, strength)


BASE = measured(0, 1, style_gain=0.0, adherence=1.0, novelty=1.4)


def test_the_most_that_costs_nothing() -> None:
    candidates = [
        measured(50, 1, style_gain=0.3, adherence=1.0, novelty=1.3),
        measured(100, 1, style_gain=0.6, adherence=0.95, novelty=1.2),
        measured(150, 1, style_gain=0.8, adherence=0.4, novelty=1.2),
    ]
    choice = Decision(BASE, candidates).choice()
    assert choice.recommended is candidates[1]
    assert choice.certain
    assert choice.reason.startswith("step 100: style gain 0.6")
    assert candidates[2] in choice.front  # it learned most


def test_of_two_that_learned_as_much_the_cheaper_one() -> None:
    dear, cheap = (
        measured(200, 1.0, noise=0.05, style_gain=0.61, adherence=0.80),
        measured(100, 0.8, noise=0.05, style_gain=0.60, adherence=0.97),
    )
    choice = Decision(measured(0, 1, style_gain=0.0, adherence=1.0), [dear, cheap]).choice()
    assert choice.recommended is cheap
    assert choice.certain
    assert "step 100 at strength 0.8" in choice.reason
    assert "step 200 has learned no more that could be detected, and has prompt adherence 0.8" in choice.reason


@pytest.mark.parametrize(("lead", "kept"), [(1.6, "cheap"), (1.9, "dear"), (2.3, "dear")])
def test_a_lead_is_tested_one_sided(lead: float, kept: str) -> None:
    """Of 16 pictures, a lead of 1.75 standard errors has a one-sided p-value of 0.05, and one of 2.13 a two-sided."""
    own = normal(7)
    error = own.std(ddof=1) / NUM**0.5
    base = measured(0, 1, style_gain=0.0, adherence=1.0)
    costs = measured(1, 1, adherence=0.97).values, measured(2, 1, adherence=0.80).values
    cheap = Measurement.of(100, {"style_gain": 0.6 + 0.1 * SCATTER, **costs[0]})
    dear = Measurement.of(200, {"style_gain": 0.6 + 0.1 * (SCATTER + own + lead * error), **costs[1]})
    choice = Decision(base, [cheap, dear]).choice()
    assert choice.recommended is {"cheap": cheap, "dear": dear}[kept]


def test_it_says_when_it_cannot_tell() -> None:
    one, two = measured(100, 1, noise=0.05, style_gain=0.6), measured(200, 1, noise=0.05, style_gain=0.605)
    choice = Decision(measured(0, 1, style_gain=0.0), [one, two]).choice()
    assert choice.recommended in (one, two)
    assert not choice.certain
    assert f"{NUM} pictures cannot tell it from step" in choice.reason


def test_nothing_is_recommended_where_all_forget() -> None:
    candidates = [measured(50, s, style_gain=0.5, adherence=0.2, novelty=1.0) for s in (0.6, 1.0)]
    choice = Decision(BASE, candidates).choice()
    assert choice.recommended is None
    assert "prompt adherence 0.2" in choice.reason


def test_copies_are_not_recommended() -> None:
    copies = measured(300, 1, style_gain=0.9, adherence=1.0, novelty=0.1)
    sound = measured(100, 1, style_gain=0.5, adherence=1.0, novelty=1.1)
    assert Decision(BASE, [copies, sound]).choice().recommended is sound


def test_nothing_is_recommended_that_is_like_the_base() -> None:
    choice = Decision(BASE, [measured(50, 1, style_gain=0.0, adherence=1.0, novelty=1.4)]).choice()
    assert choice.recommended is None
    assert not choice.certain
    assert "cannot be told from the base's" in choice.reason


def test_what_was_learned_must_be_measured() -> None:
    base = measured(0, 1, adherence=1.0)
    with pytest.raises(UserError, match="at least 4 held-out images"):
        Decision(base, [measured(50, 1, adherence=0.9)]).choice()
