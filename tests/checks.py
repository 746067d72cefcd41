"""What several tests need to check: that two nested states are the same, and what happens when a disk is full."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


def assert_equal(a: Any, b: Any, where: str) -> None:
    """Nested states, to the bit; functions in them are not compared."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    elif not callable(a):
        assert a == b, where


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file grows past `room` bytes: the call fails as it does on a full disk, with another word for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def slow(*values: Any) -> Any:
    """A set of parameters that only `make test-all` tries."""
    return pytest.param(*values, marks=pytest.mark.slow)
