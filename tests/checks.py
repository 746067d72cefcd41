"""What several tests need: comparing nested states, a full disk, and a module that has been trained."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdft.objective.denoising import Denoising
from sdft.tuning.full import Full


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


def long(*values: Any) -> Any:
    """A set of parameters that only `make test-long` tries."""
    return pytest.param(*values, marks=pytest.mark.long)


def trained_module(model: Any, tuning: Any) -> SimpleNamespace:
    """What the export needs of a run, with weights that have visibly moved."""
    torch.manual_seed(0)
    tuning.attach(model.eval())
    noise, full = torch.Generator().manual_seed(5), isinstance(tuning, Full)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn(p.shape, generator=noise) * (p.abs().mean() if full else 1)
    return SimpleNamespace(model=model, tuning=tuning, objective=Denoising())
