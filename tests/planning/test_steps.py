"""The length of a run by the number of its images."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sdft.errors import UserError
from sdft.planning.steps import num_steps


def data(*counts: int) -> SimpleNamespace:
    """A data module with so many images of each size."""
    sizes = {(64, 64 + 16 * i): range(count) for i, count in enumerate(counts)}
    return SimpleNamespace(sizes=None, own_per_pass=1, train_set=SimpleNamespace(by_size=lambda: sizes))


@pytest.mark.parametrize(
    ("counts", "epochs", "fewest", "expected"),
    [
        ((20,), 60, 1, 300),  # 5 steps of 4 images
        ((20,), 0.5, 1, 2),
        ((13, 3), 10, 1, 50),  # 4 steps of the one size and 1 of the other
        ((4,), 10, 200, 200),
        ((400,), 60, 200, 2000),
        ((20,), None, 1, 2000),
    ],
)
def test_epochs_become_steps_within_the_limits(counts, epochs, fewest: int, expected: int) -> None:
    assert num_steps(data(*counts), per_step=4, epochs=epochs, fewest=fewest, most=2000) == expected


@pytest.mark.parametrize(("epochs", "fewest"), [(0, 1), (-1, 1), ("ten", 1), (float("nan"), 1), (1, 0), (True, 1)])
def test_other_numbers_are_refused(epochs, fewest) -> None:
    with pytest.raises(UserError, match=r"(epochs|min_steps)=.*must be a number above 0"):
        num_steps(data(20), 4, epochs, fewest, 2000)
