"""An extension of Griffe: arguments in docstrings, written as lines `name: text`, become a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

ARGUMENT = re.compile(r"^((?:\*{0,2}[a-zA-Z_]\w*)(?:, \*{0,2}[a-zA-Z_]\w*)*): (?=\S)")


def with_lists(docstring: str) -> str:
    """The docstring in Markdown; a continuation line stays indented below its argument."""
    lines: list[str] = []
    in_list = False
    for line in docstring.splitlines():
        found = ARGUMENT.match(line)
        if found and (in_list or not lines or not lines[-1].strip()):
            names = ", ".join(f"`{name}`" for name in found[1].split(", "))
            line, in_list = f"- {names}: {line[found.end() :]}", True
        elif not line.startswith("    "):
            in_list = False
        lines.append(line)
    return "\n".join(lines)


class Arguments(griffe.Extension):
    """Applies `with_lists` to everything that is documented."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_lists(obj.docstring.value)
