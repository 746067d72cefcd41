"""Several problems as one error message, and errors that a check collects instead of ending at the first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from sdft.errors import UserError

MOST_INLINE = 10
_collected: ContextVar[list[UserError] | None] = ContextVar("_collected", default=None)


@contextmanager
def collected() -> Iterator[list[UserError]]:
    """Inside the `with`, `complain` adds to this list: what is wrong with some samples does not hide the others."""
    errors: list[UserError] = []
    token = _collected.set(errors)
    try:
        yield errors
    finally:
        _collected.reset(token)


def complain(error: UserError) -> None:
    """Raise an error, or add it to those that are `collected`; the caller then goes on without what is wrong."""
    errors = _collected.get()
    if errors is None:
        raise error
    if str(error) not in map(str, errors):
        errors.append(error)


def join_problems(problems: Sequence[str]) -> str:
    """The problems joined by commas; one per line if there are more than `MOST_INLINE`."""
    if len(problems) <= MOST_INLINE:
        return ", ".join(problems)
    return "\n  " + "\n  ".join(problems) + "\n"
