"""Commands of several processes, started as users start them: a sweep, torchrun's environment, an error of all."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import yaml
from warm import WarmPython

from sdft.training import receipt

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "logger=csv",
    "verdict=none",
    "callbacks=checkpoints",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "trainer.max_steps=2",
    "trainer.precision=32-true",
    "trainer.progress_bar=false",
    "data.batch_size=2",
    "data.train.num_scenes=8",
    "data.validation.num_scenes=2",
]


def ranks(*words: str) -> list[tuple[list[str], dict[str, str]]]:
    """A command as torchrun starts it on two devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [str(ROOT / "train.py"), *SMALL, *words]
    return [
        (command, {**meet, "TORCHELASTIC_RUN_ID": "test", "RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")
    ]


@pytest.mark.slow
def test_each_job_of_a_sweep_has_its_own_processes(python: WarmPython, tmp_path: Path) -> None:
    """Lightning starts the second process; the first job fails in both, the second is none of its business."""
    sweep = ["-m", "strategy=ddp", "optimizer.lr=1e15,1e-3", "metric=val/eps_mse", f"hydra.sweep.dir={tmp_path}/swept"]
    status, printed = python.run([str(ROOT / "train.py"), *SMALL, *sweep], tmp_path)
    assert status == 2, printed
    assert printed.count("effective batch 4 (2 x 1 accumulated x 2 devices)") == 2, printed
    assert printed.count("written to") == 1
    *_, reason = (tmp_path / "swept" / "table.txt").read_text().splitlines()
    assert reason.startswith("0 failed: the loss became NaN or infinite at step 1")
    # Printed by the job, again at the end of the sweep, and in the table.
    assert printed.count("the loss became NaN") == 3, printed
    done = tmp_path / "swept" / "1"
    record = json.loads((done / receipt.NAME).read_text())
    assert "lora" in record["outputs"]
    assert "optimizer.lr=0.001" in record["overrides"]
    assert yaml.safe_load((done / ".hydra" / "overrides.yaml").read_text()) == record["overrides"]
    assert {job.name for job in (tmp_path / "swept").iterdir() if job.is_dir()} == {"0", "1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["size=60"], "error: size=60: must be a multiple of 16"),
        (["optimizer.lr=1e15"], "error: the loss became NaN or infinite at step 1"),
    ],
    ids=["before they meet", "after they have met"],
)
def test_an_error_of_all_ranks_is_printed_once(words: list[str], message: str, python: WarmPython, tmp_path) -> None:
    results = python.together(ranks(*words, f"run_dir={tmp_path}/run"), tmp_path)
    assert [status for status, _ in results] == [2, 2]
    printed = "".join(text for _, text in results)
    assert printed.count("error:") == 1, printed
    assert message in printed
