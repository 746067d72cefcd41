"""A cross-section of `tries.py`, and all of them with the marker `long`."""

from __future__ import annotations

import random

import pytest
from warm import WarmPython

from robustness.attempt import Try, outcome
from robustness.inputs import nano_file
from robustness.tries import all_tries

TRIES = all_tries()
SOME = random.Random(1)
KINDS = dict.fromkeys(one.kind for one in TRIES)
FEW = [one for kind in KINDS for one in SOME.sample([other for other in TRIES if other.kind == kind], 4)]


@pytest.fixture(scope="module")
def files() -> None:
    """What the tries share is made before the first."""
    nano_file()


def ids(one: Try) -> str:
    return f"{one.kind}: {one.name}"[:80]


@pytest.mark.parametrize("one", FEW, ids=ids)
def test_it_is_done_or_refused_in_a_few_lines(one: Try, files: None, python: WarmPython) -> None:
    assert outcome(one, python) == ""


@pytest.mark.long
@pytest.mark.parametrize("one", TRIES, ids=ids)
def test_each_is_done_or_refused_in_a_few_lines(one: Try, files: None, python: WarmPython) -> None:
    assert outcome(one, python) == ""


def test_they_find_what_is_wrong(python: WarmPython) -> None:
    """A command that succeeds where it must not, one that fails with a traceback, one that says something else."""
    assert outcome(Try("x", "x", ["-c", "pass"]), python).startswith(("exit code", "a traceback"))
    help_is_done = ["-m", "sdft.formats", "--help"]
    assert outcome(Try("x", "x", help_is_done, code=0), python) == ""
    assert outcome(Try("x", "x", help_is_done), python).startswith("exit code 0")
    assert outcome(Try("x", "x", help_is_done, code=0, says="zorbix"), python).startswith("does not say")
    assert "traceback" in outcome(Try("x", "x", ["-m", "nowhere"], code=None), python)
