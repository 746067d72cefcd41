"""A hook of MkDocs: one reference page per package of sdft, from its docstrings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
MODULES = ("api", "batch", "protocols", "module", "objective", "tuning", "optimizers", "models", "sampling", "data",
           "evaluation", "merging", "formats", "training", "distributed", "planning", "config", "rng")  # fmt: skip


def on_config(config: Any) -> Any:
    """List the pages in the navigation."""
    config.nav[-1] = {"Reference": [{f"sdft.{name}": f"reference/{name}.md"} for name in MODULES]}
    return config


def on_files(files: Files, config: Any) -> Files:
    """Create the pages."""
    for name in MODULES:
        content = f"# sdft.{name}\n\n::: sdft.{name}\n"
        files.append(File.generated(config, f"reference/{name}.md", content=content))
    return files
