"""The commands of the README and of the pages of docs/ run, those of the real model on a thin SDXL."""

from __future__ import annotations

from pathlib import Path

import pytest
from page_commands import ROOT, commands, run_page

from benchmarks.synthetic import Synthetic

PAGES = {
    "README.md": 30,
    "docs/getting_started.md": 4,
    "docs/recipes.md": 1,
    "docs/preferences.md": 5,
    "docs/data.md": 1,
    "docs/compare.md": 10,
    "docs/merging.md": 20,
    "docs/formats.md": 1,
    "docs/scaling.md": 2,
    "docs/cluster.md": 3,
}
"""Page -> least number of commands that this test runs of it."""
LONG = {"docs/choosing.md": 5, "docs/training.md": 10}
"""The same, of `make test-long`: each command is a training run, and tests/test_docs.py composes them."""


@pytest.mark.parametrize("page", [*PAGES, *LONG])
def test_a_page_has_commands(page: str) -> None:
    assert len(commands(ROOT / page)) >= {**PAGES, **LONG}[page]


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("page", [*PAGES, *(pytest.param(page, marks=pytest.mark.long) for page in LONG)])
def test_the_commands_of_a_page_run(page: str, thin_sdxl: Synthetic, tmp_path: Path) -> None:
    assert run_page(ROOT / page, tmp_path, thin_sdxl) >= {**PAGES, **LONG}[page]
