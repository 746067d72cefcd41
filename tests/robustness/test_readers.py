"""A few of the files of `readers.py`, always the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from robustness.readers import READERS, outcome


@pytest.mark.parametrize("kind", READERS)
def test_a_reader_reads_or_refuses_whatever_the_bytes(kind: str, tmp_path: Path) -> None:
    seen = set()

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(READERS[kind][1])
    def attempt(content: bytes) -> None:
        seen.add(outcome(kind, content, tmp_path))

    attempt()
    assert seen == {"read", "refused"}
