"""What a finished run of train.py leaves in its folder: the summary, and the artifacts that it names.

Knows names of files; must not know what becomes of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUMMARY = "summary.json"


@dataclass(frozen=True)
class RunOutputs:
    """What a run left."""

    summary: Mapping[str, Any]
    artifacts: Mapping[str, Path]
    """By kind (`lora`, `lora_kohya`, `words`, `model`, `pictures`), beside the summary: the folder may have moved."""

    @property
    def lora(self) -> Path | None:
        return self.artifacts.get("lora", self.artifacts.get("lora_kohya"))

    @property
    def weights(self) -> Path | None:
        """What the run learned: its LoRA, else its model."""
        return self.lora or self.artifacts.get("model")


def read_summary(run: Path) -> dict[str, Any] | None:
    """Figures and artifacts as the run wrote them down; none where it did not finish."""
    file = run / SUMMARY
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def read_run_outputs(run: Path) -> RunOutputs | None:
    """What a run left; none where it did not finish. What was deleted since is not looked for."""
    summary = read_summary(run)
    if summary is None:
        return None
    return RunOutputs(summary, {kind: run / Path(path).name for kind, path in summary.get("artifacts", {}).items()})
