"""How several problems become one message."""

from __future__ import annotations

from collections.abc import Sequence

MOST_INLINE = 10


def listed(problems: Sequence[str]) -> str:
    """All of them: a few in one line, many on a line each."""
    if len(problems) <= MOST_INLINE:
        return ", ".join(problems)
    return "\n  " + "\n  ".join(problems) + "\n"
