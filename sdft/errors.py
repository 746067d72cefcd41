"""The one error that is meant for the user."""

from __future__ import annotations


class UserError(Exception):
    """An error whose message says what is wrong and what to do; the verbs print it without a traceback."""
