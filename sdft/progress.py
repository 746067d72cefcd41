"""Progress bars that can be switched off: the commands show them, the Python API does so with `progress=True`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm as _tqdm

__all__ = ["ENOUGH_FOR_A_BAR", "are_shown", "no_progress_bars", "tqdm"]

ENOUGH_FOR_A_BAR = 512
"""Images or captions that are read within seconds: fewer need no bar."""

_shown: ContextVar[bool] = ContextVar("shown", default=True)


def are_shown() -> bool:
    """Whether progress bars are shown in this context."""
    return _shown.get()


@contextmanager
def no_progress_bars(hidden: bool = True) -> Iterator[None]:
    """Inside the `with`, progress bars that are created show nothing, if `hidden`."""
    token = _shown.set(_shown.get() and not hidden)
    try:
        yield
    finally:
        _shown.reset(token)


class tqdm(_tqdm):
    """tqdm, disabled inside `no_progress_bars`."""

    def __init__(self, *args: Any, disable: bool | None = False, **kwargs: Any):
        super().__init__(*args, disable=disable or not are_shown(), **kwargs)
