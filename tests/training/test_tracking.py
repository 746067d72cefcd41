"""A run of Weights & Biases continues under its id after a requeue, and only then."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checks import slow

from sdft.training.callbacks.tracking import wandb_logger


def test_the_id_of_a_run_is_kept_in_its_folder(tmp_path: Path) -> None:
    first, again, other = (
        wandb_logger(str(tmp_path), "run", mode="offline", resume=resume).version for resume in (None, "auto", None)
    )
    assert first == again != other
    assert first
    assert (tmp_path / "wandb_id.txt").read_text() == other


def test_metrics_after_a_requeue_are_logged_under_the_same_id(tmp_path: Path) -> None:
    """Offline, for real: two parts on disk, which `wandb sync RUN_FOLDER/wandb/offline-run-*` takes in order."""
    for step in range(2):
        logger = wandb_logger(str(tmp_path), "run", mode="offline", resume="auto")
        logger.log_metrics({"loss": 1.0 / (step + 1)}, step)
        logger.experiment.finish()
        time.sleep(1)  # W&B names the folders of the parts by the second
    parts = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    kept = (tmp_path / "wandb_id.txt").read_text()
    assert [part.name.rpartition("-")[2] for part in parts] == [kept, kept]
    assert all((part / f"run-{kept}.wandb").stat().st_size for part in parts)


@pytest.mark.parametrize("variables", [{}, slow({"WANDB_MODE": "offline"})])
def test_without_a_key_it_is_offline_silent_and_without_launcher(tmp_path: Path, variables: dict[str, str]) -> None:
    """As on a fresh machine, by hand and by make; in a separate process, since W&B reads its settings once."""
    script = "import sys, sdft.training.callbacks.tracking as t; t.wandb_logger(sys.argv[1], 'x').experiment; "
    script += "print('wandb.sdk.launch' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | variables
    env["HOME"] = str(tmp_path)
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("False\n", "")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
