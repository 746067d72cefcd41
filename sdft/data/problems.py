"""Several problems in one error message."""

from __future__ import annotations

from collections.abc import Sequence

MOST_INLINE = 10


def listed(problems: Sequence[str]) -> str:
    """All problems: up to ten in one line, more on a line each."""
    if len(problems) <= MOST_INLINE:
        return ", ".join(problems)
    return "\n  " + "\n  ".join(problems) + "\n"
