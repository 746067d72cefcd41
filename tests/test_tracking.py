"""A run of Weights & Biases goes on under its id after a requeue, and only then."""

from __future__ import annotations

from pathlib import Path

from sdft.callbacks.tracking import wandb_logger


def test_the_id_of_a_run_is_kept_in_its_folder(tmp_path: Path) -> None:
    first, again, other = (
        wandb_logger(str(tmp_path), "run", mode="offline", resume=resume).version for resume in (None, "auto", None)
    )
    assert first == again != other
    assert first
    assert (tmp_path / "wandb_id.txt").read_text() == other
