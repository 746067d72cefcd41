"""Reads the folder of a finished run of train.py: its summary and its artifacts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUMMARY = "summary.json"


@dataclass(frozen=True)
class RunOutputs:
    """The summary and the artifacts of a finished run."""

    summary: Mapping[str, Any]
    artifacts: Mapping[str, Path]
    """By kind (`lora`, `lora_kohya`, `words`, `model`, `pictures`): paths in the folder, which may have been moved."""

    @property
    def lora(self) -> Path | None:
        return self.artifacts.get("lora", self.artifacts.get("lora_kohya"))

    @property
    def weights(self) -> Path | None:
        """The trained weights: the LoRA, else the model."""
        return self.lora or self.artifacts.get("model")


def read_summary(run: Path) -> dict[str, Any] | None:
    """The content of summary.json: metrics and artifacts. None if the run did not finish."""
    file = run / SUMMARY
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def read_run_outputs(run: Path) -> RunOutputs | None:
    """The outputs of a run; None if it did not finish. Artifacts may have been deleted since."""
    summary = read_summary(run)
    if summary is None:
        return None
    return RunOutputs(summary, {kind: run / Path(path).name for kind, path in summary.get("artifacts", {}).items()})
