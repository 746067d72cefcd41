"""The one error that is meant for the user, and the suggestions and lists in its message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error in the user's input, with the remedy in its message; commands print it without a traceback."""


def closest(text: object, candidates: Iterable[object]) -> str | None:
    """The candidate that is spelled most like the text; None if none is close."""
    return next(iter(difflib.get_close_matches(str(text), [str(c) for c in candidates], 1)), None)


def did_you_mean(text: object, candidates: Iterable[object]) -> str:
    """`; did you mean 'x'?`, or nothing if no candidate is close."""
    guess = closest(text, candidates)
    return f"; did you mean '{guess}'?" if guess else ""


def listed(problems: Iterable[str], most: int = 20) -> str:
    """One problem per line, sorted; of more than `most`, their number in the last line."""
    lines = sorted(problems)
    rest = [f"  and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join([f"  {line}" for line in lines[:most]] + rest)
