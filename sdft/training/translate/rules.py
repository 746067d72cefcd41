"""How a table of rules turns the options of another trainer into a `Command`, so that none of them gets lost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdft.errors import UserError, did_you_mean
from sdft.training.translate.command_line import Command

OFF = (None, False, "", 0, "NONE", "None", "NEVER", "none", "false", "False")
"""Values with which an option does nothing."""
SECRET = ("token", "api_key", "secret", "password")


@dataclass(frozen=True)
class Same:
    """An option that has the same meaning here.

    option: its name here. default: the other trainer's, written if none is given; None if it is ours.
    """

    option: str
    default: Any = None


Rules = Mapping[Callable[["Given", Command], None], tuple[str, ...]]
"""Functions that translate, and the keys of the other trainer that each reads."""


@dataclass(frozen=True)
class Table:
    """What is known of another trainer's options.

    same: key -> its option here. rules: function -> the keys that it reads. without: key -> why there is no option, or
    what to do instead; empty if it changes nothing in the weights. neutral: key -> values, beside `OFF`, with which
    it changes nothing.
    """

    same: Mapping[str, Same]
    rules: Rules
    without: Mapping[str, str]
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def known(self) -> set[str]:
        """All keys of the other trainer."""
        return {*self.same, *self.without, *(key for keys in self.rules.values() for key in keys)}


class Given:
    """The options of a config of another trainer.

    source: the file, for messages. context: what else its rules read.

    Raises UserError, from all its methods, for a value of the wrong kind.
    """

    def __init__(self, values: Mapping[str, Any], source: str, known: Collection[str], context: Any = None):
        self.values, self.source, self.known, self.context = dict(values), source, known, context

    def __contains__(self, key: str) -> bool:
        assert key in self.known, key
        return self.values.get(key) not in (None, "")

    def get(self, key: str, default: Any = None) -> Any:
        """The value as given; the default if it is not, or null."""
        return self.values[key] if key in self else default

    def flag(self, key: str, default: bool = False) -> bool:
        """A switch: given without a value, or with a truth value."""
        value = self.get(key, default)
        words = {"true": True, "false": False, "1": True, "0": False}
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        if isinstance(value, bool):
            return value
        raise UserError(f"{self.source}: {key}={value}: must be true or false")

    def number(self, key: str, default: Any = None) -> Any:
        """A number, an int if it is written as one; the default if it is not given."""
        return as_number(self.get(key, default), f"{self.source}: {key}")

    def text(self, key: str, default: str = "") -> str:
        """A single text."""
        value = self.get(key, default)
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
        raise UserError(f"{self.source}: {key}={value}: must be one value")

    def items(self, key: str) -> list[Any]:
        """A list; of one element if a single value is given."""
        value = self.get(key, [])
        return list(value) if isinstance(value, list | tuple) else [value]


def as_number(value: Any, where: str) -> Any:
    """An int or a float of a number or of its text; None stays."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    raise UserError(f"{where}={value}: must be a number")


def typed(value: Any) -> Any:
    """A text of a command line as the number or truth value that it spells."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        return as_number(value, "") if isinstance(value, str) else value
    except UserError:
        return value


def apply(table: Table, given: Given, command: Command) -> None:
    """Translate all options by a table, and account for each of them: in an override or in a comment."""
    for key, same in table.same.items():
        value = typed(given.get(key, same.default))
        if value is not None:
            command.set(same.option, value, key)
    for rule, keys in table.rules.items():
        try:
            rule(given, command)
        except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
            named = ", ".join(key for key in keys if key in given.values)
            raise UserError(f"{given.source}: {named}: one has a value that cannot be understood ({error})") from error
    for key, why in table.without.items():
        value = given.get(key)
        if why and value not in (*OFF, [], {}, *table.neutral.get(key, ())):
            hidden = value is True or any(word in key for word in SECRET) or isinstance(value, dict)
            command.lack(key, why, None if hidden else value)
    for key in given.values:
        if key not in table.known:
            command.unknown[key] = did_you_mean(key, table.known)
        elif key not in command.cited:
            command.same.append(key)
