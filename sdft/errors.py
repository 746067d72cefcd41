"""The one error that is meant for the user."""

from __future__ import annotations


class UserError(Exception):
    """An error in the user's input, with the remedy in its message; commands print it without a traceback."""
