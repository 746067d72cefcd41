"""Reads the folder of a finished run of train.py: its summary and its artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft.errors import UserError
from sdft.formats.json_file import read_json

SUMMARY, RECEIPT, BEFORE_AFTER = "summary.json", "receipt.json", "before_after.png"


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
    return read_json(file) if file.is_file() else None


def read_run_outputs(run: Path) -> RunOutputs | None:
    """The outputs of a run; None if it did not finish. Artifacts may have been deleted since."""
    summary = read_summary(run)
    if summary is None:
        return None
    artifacts = summary.get("artifacts") or {}
    if not isinstance(artifacts, dict) or not all(isinstance(path, str) for path in artifacts.values()):
        raise UserError(f"{run / SUMMARY}: its artifacts are not names and paths; it was not written by train.py")
    return RunOutputs(summary, {kind: run / Path(path).name for kind, path in artifacts.items()})
