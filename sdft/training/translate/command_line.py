"""The command line that a translation comes to, and the comments below it.

Knows the grammars of Hydra's overrides and of a POSIX shell; nothing here knows another trainer.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH = 120
ORDER = (
    "model",
    "tuning",
    "rank",
    "class_images",
    "objective",
    "optimizer",
    "fused_backward",
    "lr_schedule",
    "epochs",
    "trainer",
    "data",
    "size",
    "caption",
    "default_caption",
    "callbacks",
    "prompts",
    "sampler",
    "logger",
    "export",
    "seed",
    "name",
    "run_dir",
    "resume",
)
"""Options by the first part of their names, as they are printed."""
PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./+-]*")
"""Texts that Hydra takes without quotes, unless they are one of `WORDS`."""
WORDS = ("true", "false", "null", "nan", "inf")
CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Raw:
    """A value in Hydra's own notation, such as an interpolation."""

    text: str


@dataclass
class Command:
    """Overrides of `python train.py`, and what is to be said about the options that have none.

    overrides: option -> value in Hydra's notation; None for one that is removed.
    without: options of the other trainer that have no counterpart, with the reason or the remedy.
    differs: what the run will do differently though no option says so.
    unknown: options that the other trainer does not have either.
    cited: the other trainer's options that one of these is about.
    """

    overrides: dict[str, str | None] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)
    differs: list[str] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    same: list[str] = field(default_factory=list)
    cited: set[str] = field(default_factory=set)

    def set(self, option: str, value: Any, *keys: str) -> None:
        """Set an option. keys: the other trainer's options that it comes from."""
        self.overrides[option] = hydra_value(value)
        self.cited.update(keys)

    def remove(self, option: str, *keys: str) -> None:
        """Remove a node of the config, such as a callback."""
        self.overrides[option] = None
        self.cited.update(keys)

    def lack(self, key: str, why: str, value: Any = None) -> None:
        """Say that an option has no counterpart. value: as given; left out of the comment if None."""
        self.without[key if value is None else f"{key}={shown(value)}"] = why
        self.cited.add(key)

    def drop(self, option: str, key: str, why: str) -> None:
        """Take back an option that has no meaning beside others, and say so. key: the other trainer's option."""
        if (value := self.overrides.pop(option, None)) is not None:
            self.lack(key, why, value)

    def differ(self, text: str, *keys: str) -> None:
        """Say that the run will differ."""
        if text not in self.differs:
            self.differs.append(text)
        self.cited.update(keys)

    def lines(self) -> list[str]:
        """The overrides, in the order in which they are printed."""
        ranked = sorted(self.overrides.items(), key=lambda item: rank_of(item[0]))
        return [f"~{option}" if value is None else f"{option}={value}" for option, value in ranked]

    def text(self, title: str = "") -> str:
        """The command line, one override a line, and the comments, ready for a shell script."""
        first, *rest = self.lines()
        command = " \\\n  ".join([f"python train.py {shell_word(first)}", *map(shell_word, rest)])
        parts = [f"# {printable(title)}"] if title else []
        parts.append(command)
        parts += comment("No counterpart here:", [f"{key}: {why}" for key, why in self.without.items()])
        parts += comment("The run differs in:", self.differs)
        parts += comment("Not an option there either:", [f"{key}{guess}" for key, guess in self.unknown.items()])
        parts += comment("Off, or the same here without an option:", [", ".join(self.same)] if self.same else [])
        return "\n".join(parts) + "\n"


def rank_of(option: str) -> tuple[int, bool]:
    """The place of an option in the command: by its first part, choices of a group before values."""
    bare = option.lstrip("+~")
    first = re.split(r"[./]", bare)[0]
    return ORDER.index(first) if first in ORDER else len(ORDER), "." in bare


def comment(head: str, items: Sequence[str]) -> list[str]:
    """A heading and its items as lines that a shell does not run."""
    if not items:
        return []
    lines = [f"# {head}"]
    for item in items:
        lines += textwrap.wrap(
            printable(item),
            WIDTH,
            initial_indent="#   ",
            subsequent_indent="#     ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def printable(text: str) -> str:
    """One line: a line break in a stranger's config would end the comment, and what follows it would be run."""
    return CONTROL.sub(" ", text)


def shell_word(text: str) -> str:
    """A word of a POSIX shell: in double quotes if it has single ones and nothing that a shell would expand."""
    return f'"{text}"' if "'" in text and not re.search(r'["$`\\\\!]', text) else shlex.quote(text)


def hydra_value(value: Any) -> str:
    """A value as the right side of an override."""
    if isinstance(value, Raw):
        return value.text
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{hydra_key(key)}: {hydra_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(hydra_value, value)) + "]"
    text = str(value)
    if isinstance(value, int) or (PLAIN.fullmatch(text) and text.lower() not in WORDS and not is_number(text)):
        return text
    return quoted(text)


def hydra_key(key: Any) -> str:
    """A key of a dict: Hydra allows no quotes there, so other characters are escaped by a backslash."""
    return re.sub(r"([^\w./*?+-])", r"\\\1", str(key))


def quoted(text: str) -> str:
    """A text in quotes of Hydra: it undoes backslashes only before a quote or at the end."""
    single = re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", text.replace("\n", " "))
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), single) + "'"


def is_number(text: str) -> bool:
    """Whether Hydra would read a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def shown(value: Any) -> str:
    """A given value in a comment, shortened."""
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
