"""Formats several problems as one error message."""

from __future__ import annotations

from collections.abc import Sequence

MOST_INLINE = 10


def join_problems(problems: Sequence[str]) -> str:
    """The problems joined by commas; one per line if there are more than `MOST_INLINE`."""
    if len(problems) <= MOST_INLINE:
        return ", ".join(problems)
    return "\n  " + "\n  ".join(problems) + "\n"
