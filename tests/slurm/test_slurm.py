"""The batch scripts on a real SLURM of two emulated nodes: warned, cancelled, with a node that fails, as an array."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import train
from sdft import receipt

ROOT = Path(__file__).resolve().parents[2]
LAB = Path(__file__).with_name("slurm_up.sh")
MISSING = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if shutil.which(name) is None]
WHY_NOT = (
    f"no {', '.join(MISSING)} here: apt-get install -y --no-install-recommends slurm-wlm munge"
    if MISSING
    else "" if os.geteuid() == 0 else "the emulated nodes are started by root"
)  # fmt: skip
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600), pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

SMALL = [
    "logger=csv",
    "verdict=none",
    "callbacks=checkpoints",
    "callbacks.last.every=5",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.progress_bar=false",
    "trainer.validate_every=1000",
    "data.batch_size=2",
    "data.train.num_scenes=8",
    "data.validation.num_scenes=2",
    "rank=2",
]
ON_CPU = ["--gpus-per-task=0", "--cpus-per-task=1"]
"""Options of sbatch that override those of the scripts."""
NUM_STEPS = 60


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A SLURM of two nodes; one thread a process."""
    folder = tmp_path_factory.mktemp("slurm")
    kept, threads = dict(os.environ), torch.get_num_threads()
    os.environ |= {"SLURM_CONF": f"{folder}/slurm.conf", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    os.environ |= {"OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    try:
        subprocess.run([LAB, "start", folder], check=True, timeout=60)
        yield
    finally:
        subprocess.run([LAB, "stop", folder], check=False, timeout=120)
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(kept)


def told(*words: object) -> str:
    """What a command of SLURM says."""
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def sbatch(log: Path, script: str, *words: str, options: list[str]) -> str:
    """The number of the job."""
    command = ["sbatch", f"--output={log}", *ON_CPU, *options, f"slurm/{script}.sbatch", *SMALL, *words]
    return told(*command).split()[-1]


def trained(run_dir: Path, log: Path, *words: str, nodes: int = 1) -> str:
    steps = f"trainer.max_steps={NUM_STEPS}"
    return sbatch(log, "train", steps, f"run_dir={run_dir}", *words, options=[f"--nodes={nodes}"])


def state(job: str) -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", told("scontrol", "show", "job", job)))


def wait_for(what: Callable[[], bool], log: Path, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, log.read_text() if log.is_file() else f"{log} is not there"
        time.sleep(0.2)


def ended(job: str) -> bool:
    return state(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def wait_to_complete(job: str, log: Path) -> None:
    wait_for(lambda: ended(job), log)
    assert state(job)["JobState"] == "COMPLETED", log.read_text()


def outputs(run_dir: Path) -> dict[str, str]:
    return json.loads((run_dir / receipt.NAME).read_text())["outputs"]


def last(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "last.ckpt"


def test_two_nodes_warned_and_queued_again_end_as_if_nothing_had_happened(slurm: None, tmp_path: Path) -> None:
    """USR1 -> saved at the end of the step -> queued again -> the weights of a run that was left alone."""
    runs, logs = ([tmp_path / f"{kind}{n}" for n in range(2)] for kind in ("run", "log"))
    jobs = [trained(run, log, nodes=2) for run, log in zip(runs, logs, strict=True)]
    wait_for(last(runs[0]).is_file, logs[0])
    told("scancel", "--signal=USR1", "--batch", jobs[0])
    for job, log in zip(jobs, logs, strict=True):
        wait_to_complete(job, log)
    assert [state(job)["Restarts"] for job in jobs] == ["1", "0"]
    (stopped_at,) = re.findall(r"stopped early: saved .* after step (\d+)", logs[0].read_text())
    assert 5 <= int(stopped_at) < NUM_STEPS
    assert "effective batch 4 (2 x 1 accumulated x 2 devices)" in logs[0].read_text()
    assert outputs(runs[0]) == outputs(runs[1])


def test_a_warning_before_python_listens_and_a_node_that_fails_cost_only_time(
    slurm: None, tmp_path: Path, monkeypatch
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    job = trained(run, log)
    wait_for(lambda: state(job)["JobState"] == "RUNNING", log)
    time.sleep(1)
    told("scancel", "--signal=USR1", "--batch", job)
    words = [*SMALL, f"trainer.max_steps={NUM_STEPS}", f"run_dir={tmp_path}/alone"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    train.main()
    wait_for(last(run).is_file, log)
    assert state(job)["Restarts"] == "1"
    assert "stopped early with status 138" in log.read_text()
    node = state(job)["BatchHost"]
    told("scontrol", "update", f"nodename={node}", "state=down", "reason=test")  # it comes back by itself
    wait_to_complete(job, log)
    assert "Node failure" in log.read_text()
    assert state(job)["Restarts"] == "2"
    assert outputs(run) == outputs(tmp_path / "alone")


def test_a_cancelled_run_leaves_a_whole_checkpoint_and_nothing_half_written(slurm: None, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    job = trained(run, log, "trainer.max_steps=100000")
    wait_for(last(run).is_file, log)
    told("scancel", job)
    wait_for(lambda: ended(job), log)
    assert state(job)["JobState"] == "CANCELLED"
    names = {path.name for path in run.rglob("*") if path.is_file()}
    assert not [name for name in names if name.startswith(".") or name.endswith((".partial", ".tmp"))]
    assert "summary.json" not in names
    assert torch.load(last(run), weights_only=False)["global_step"] % 5 == 0


def test_arrays_and_submitit_make_the_same_sweep_and_report_the_job_that_failed(
    slurm: None, tmp_path: Path, monkeypatch, capsys
) -> None:
    """60 is no multiple of 16, which a job finds out by itself; the other three end well."""
    grid = ["trainer.max_steps=1", "metric=val/eps_mse", "size=32,48,64,60"]
    array = sbatch(tmp_path / "log", "sweep", *grid, f"hydra.sweep.dir={tmp_path}/array", options=["--array=2"])
    resources = ["hydra.launcher.gpus_per_task=null", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10"]
    words = ["-m", "hydra/launcher=slurm", *resources, f"hydra.sweep.dir={tmp_path}/submitit", *SMALL, *grid]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 2
    assert "size=60" in capsys.readouterr().err
    *jobs, reason = (tmp_path / "submitit" / "table.txt").read_text().splitlines()
    assert [job.split()[-1] for job in jobs] == ["folder", "0", "1", "2", "3"]
    assert reason.startswith("3 failed: size=60: must be a multiple of 16")
    wait_to_complete(f"{array}_2", tmp_path / "log")
    assert outputs(tmp_path / "array" / "2") == outputs(tmp_path / "submitit" / "2")
    assert "val/eps_mse" in (tmp_path / "array" / "table.txt").read_text()
