"""The cluster's commands as docs/cluster.md has them, on a real SLURM of emulated nodes.

All jobs are there at once, and each test waits for its own: most of what a job takes is the start of Python. No wait
decides a result: what must happen in the middle of a run happens while the run stays where it is (`stay.py`).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from warm import WarmPython

from sdft.formats.training_checkpoint import read_state
from sdft.training import receipt

ROOT = Path(__file__).resolve().parents[2]
LAB = Path(__file__).with_name("slurm_up.sh")
MISSING = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if shutil.which(name) is None]
WHY_NOT = (
    f"no {', '.join(MISSING)} here: apt-get install -y --no-install-recommends slurm-wlm munge"
    if MISSING
    else "" if os.geteuid() == 0 else "the emulated nodes are started by root"
)  # fmt: skip
LIMIT = 600
"""Seconds for all jobs together, which take about a hundred: a job that hangs is reported, with its log."""
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(LIMIT + 120), pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

ONE_NODE, MANY_NODES, STOP, ARRAY, SUBMITIT = (
    line
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
    if re.match("sbatch|scancel|.*hydra/launcher=slurm", line)
)
"""The commands of the page that need a cluster."""
ON_CPU = ["--gpus-per-task=0", "--cpus-per-task=1"]
"""Options of sbatch that override those of the scripts and of the page."""
NUM_STEPS = 12
SMALL = [
    f"trainer.max_steps={NUM_STEPS}",
    "logger=csv",
    "verdict=none",
    "callbacks=checkpoints",
    "callbacks.last.every=5",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.progress_bar=false",
    "trainer.validate_every=1000",
    "data.batch_size=2",
]
FEW_SCENES = ["data.train.num_scenes=8", "data.validation.num_scenes=2"]
STAY = "+callbacks.stay={_target_: stay.Stay, after: 7, restarts: %d}"
"""A run is held between its first save and its second."""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A SLURM for as long as this process lives; one thread a process."""
    folder, kept = tmp_path_factory.mktemp("slurm"), dict(os.environ)
    with started(folder):
        os.environ |= {"SLURM_CONF": f"{folder}/slurm.conf", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        os.environ |= {"PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}"}
        yield
        os.environ.clear()
        os.environ.update(kept)


def started(folder: Path, **environment: str) -> subprocess.Popen:
    """SLURM's daemons; they end with the pipe that is their input."""
    environment, pipe = os.environ | environment, subprocess.PIPE
    # In a session of its own: a signal to this process and its group is not for the daemons.
    lab = subprocess.Popen([LAB, folder], stdin=pipe, stdout=pipe, env=environment, text=True, start_new_session=True)
    assert lab.stdout is not None
    assert lab.stdout.readline() == "ready\n"
    return lab


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's own."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(6):
        Image.linear_gradient("L").rotate(15 * number).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a gradient at {15 * number} degrees")
    return folder


@pytest.fixture(scope="module")
def stories(slurm: None, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """The results of the jobs that the tests check, which run at the same time."""
    end = time.monotonic() + LIMIT
    with ThreadPoolExecutor() as pool:
        yield {
            story.__name__: pool.submit(story, tmp_path_factory.mktemp(story.__name__), pictures, end)
            for story in (warned, failing_node, cancelled, swept, left_alone)
        }


class Job:
    """A job of SLURM, by its number."""

    def __init__(self, number: str, log: Path, end: float):
        self.number, self._log, self._end = number, log, end

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.is_file() else f"{self._log} is not there"

    @property
    def state(self) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", output_of("scontrol", "show", "job", self.number)))

    def ended(self) -> bool:
        return self.state["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    def wait_for(self, what: Callable[[], bool]) -> None:
        while not what():
            assert not self.ended() or what(), f"{self.state}\n{self.log}"
            assert time.monotonic() < self._end, f"not within {LIMIT} s: {self.state}\n{self.log}"
            time.sleep(0.3)

    def wait_to_complete(self) -> None:
        self.wait_for(self.ended)
        assert self.state["JobState"] == "COMPLETED", self.log


def output_of(*words: object, **environment: str) -> str:
    """The standard output of a command of SLURM."""
    command = [str(word) for word in words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def submitted(
    written: str, folder: Path, end: float, words: list[str], options: Sequence[str] = (), **environment: str
) -> Job:
    """The page's command with small options: those of sbatch before the script, those of train.py at the end."""
    command = shlex.split(written.replace("model=sdxl", "model=nano"))
    script = next(place for place, word in enumerate(command) if word.endswith(".sbatch"))
    command[script:script] = [f"--output={folder}/log", *ON_CPU, *options]
    number = output_of(*command, *SMALL, *words, **environment).split()[-1]
    return Job(number, folder / "log", end)


def outputs(run_dir: Path) -> dict[str, str]:
    return json.loads((run_dir / receipt.NAME).read_text())["outputs"]


def last(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "last.ckpt"


def warned(folder: Path, pictures: Path, end: float) -> Job:
    """Two nodes; stopped by hand as in docs/cluster.md."""
    words = [STAY % 0, f"run_dir={folder}/run"]
    options = ["--nodes=2", "--ntasks-per-node=1"]
    job = submitted(MANY_NODES.replace("DIR", str(pictures)), folder, end, words, options)
    job.wait_for(last(folder / "run").is_file)
    output_of(*shlex.split(STOP.replace("JOBID", job.number)))
    job.wait_to_complete()
    return job


def failing_node(folder: Path, pictures: Path, end: float) -> tuple[Job, list[str]]:
    """One node; warned before Python listens, later the node is set down."""
    deaf = folder / "deaf.sh"
    deaf.write_text(
        "#!/bin/sh\n"
        f'[ -n "$SLURM_RESTART_COUNT" ] || {{ touch {folder}/began; exec sleep 10000; }}\n'
        f'exec {sys.executable} "$@"\n'
    )
    deaf.chmod(0o755)
    words, written = [STAY % 1, f"run_dir={folder}/run"], ONE_NODE.replace("DIR", str(pictures))
    job = submitted(written, folder, end, words, ["--partition=fragile"], PYTHON=str(deaf))
    job.wait_for((folder / "began").is_file)
    output_of(*shlex.split(STOP.replace("JOBID", job.number)))
    job.wait_for(last(folder / "run").is_file)
    node = job.state["BatchHost"]
    for how in ("drain", "down"):  # its daemon is well, and would have it back at once
        output_of("scontrol", "update", f"nodename={node}", f"state={how}", "reason=test")
    job.wait_to_complete()
    return job, [node, job.state["BatchHost"]]


def cancelled(folder: Path, pictures: Path, end: float) -> Job:
    """Wherever it happens to be after its first save."""
    words = [f"run_dir={folder}/run", "trainer.max_steps=100000"]
    job = submitted(ONE_NODE.replace("DIR", str(pictures)), folder, end, words)
    job.wait_for(last(folder / "run").is_file)
    output_of("scancel", job.number)
    job.wait_for(job.ended)
    return job


def swept(folder: Path, pictures: Path, end: float) -> tuple[subprocess.CompletedProcess, Path]:
    """The grid by submitit, whose last job cannot run, and its third job as a task of an array."""
    words = [*FEW_SCENES, "trainer.max_steps=2", "metric=val/eps_mse", "trainer.validate_every=2"]
    array = submitted(ARRAY, folder, end, [*words, f"hydra.sweep.dir={folder}/array"], ["--array=2"])
    taken = folder / "submitit" / "3"
    taken.mkdir(parents=True)
    (taken / "summary.json").write_text("{}")
    (taken / receipt.NAME).write_text(json.dumps({"overrides": ["rank=1"], "outputs": {}}))
    program, *command = shlex.split(SUBMITIT)
    assert program == "python"
    resources = ["hydra.launcher.gpus_per_task=null", "hydra.launcher.cpus_per_task=1"]
    command += [*resources, *SMALL, *words, f"hydra.sweep.dir={folder}/submitit"]
    # Without accounting it would wait for ever for a job that was taken from it.
    within = ["timeout", str(LIMIT), sys.executable, *command]
    done = subprocess.run(within, capture_output=True, text=True, cwd=ROOT, check=False)
    Job(f"{array.number}_2", folder / "log", end).wait_to_complete()
    return done, folder


def left_alone(folder: Path, pictures: Path, end: float) -> Path:
    """The runs of two processes and of one, that nobody interrupts, outside SLURM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = {"WORLD_SIZE": "2", "MASTER_PORT": str(free.getsockname()[1]), "TORCHELASTIC_RUN_ID": "test"}
    common = ["train.py", "experiment=dreamy_style", "data=folder", f"data.root={pictures}", *SMALL]
    ranks = [
        ([*common, "trainer.devices=2", f"run_dir={folder}/two"], {**meet, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    for name in ("train.py", "conf"):
        (folder / name).symlink_to(ROOT / name)
    with WarmPython() as python:
        for status, printed in python.together([*ranks, ([*common, f"run_dir={folder}/one"], {})], folder):
            assert status == 0, printed
    return folder


def test_two_nodes_warned_and_queued_again_end_as_if_nothing_had_happened(stories: dict[str, Future]) -> None:
    """USR1 -> saved at the end of the step -> queued again -> the weights of a run that was left alone."""
    job = stories["warned"].result()
    assert job.state["Restarts"] == "1"
    saved = re.search(r"stopped early: saved (\S+)/checkpoints/last.ckpt after step (\d+)", job.log)
    assert saved is not None, job.log
    assert 5 <= int(saved[2]) < NUM_STEPS
    assert "effective batch 4 (2 x 1 accumulated x 2 devices)" in job.log
    assert outputs(Path(saved[1])) == outputs(stories["left_alone"].result() / "two")


def test_a_warning_before_python_listens_and_a_node_that_fails_cost_only_time(stories: dict[str, Future]) -> None:
    job, nodes = stories["failing_node"].result()
    assert "stopped early with status 138: queued again" in job.log
    assert "Node failure" in job.log
    assert job.state["Restarts"] == "2"
    assert nodes == ["node3", "node1"]
    (run_dir,) = set(re.findall(r"run folder (\S+)", job.log))
    assert outputs(Path(run_dir)) == outputs(stories["left_alone"].result() / "one")


def test_a_cancelled_run_leaves_a_whole_checkpoint_and_nothing_half_written(stories: dict[str, Future]) -> None:
    job = stories["cancelled"].result()
    assert job.state["JobState"] == "CANCELLED"
    (run_dir,) = re.findall(r"run folder (\S+)", job.log)
    names = {path.name for path in Path(run_dir).rglob("*") if path.is_file()}
    assert not [name for name in names if name.startswith(".") or name.endswith((".partial", ".tmp"))]
    assert "summary.json" not in names
    step = read_state(last(Path(run_dir)))["global_step"]
    assert f"stopped early: saved {last(Path(run_dir))} after step {step}" in job.log


def test_arrays_and_submitit_make_the_same_sweep_and_report_the_job_that_failed(stories: dict[str, Future]) -> None:
    done, folder = stories["swept"].result()
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"error: hydra.sweep.dir: {folder}/submitit/3 has a finished job of another sweep" in done.stderr
    *jobs, reason = (folder / "submitit" / "table.txt").read_text().splitlines()
    assert sorted(job.split()[-1] for job in jobs) == ["0", "1", "2", "3", "folder"]
    assert reason.startswith("3 failed: hydra.sweep.dir:")
    assert outputs(folder / "array" / "2") == outputs(folder / "submitit" / "2")
    assert "val/eps_mse" in (folder / "array" / "table.txt").read_text()


def test_daemons_do_not_outlive_a_test_that_is_killed(tmp_path: Path) -> None:
    killed = "import os; from pathlib import Path; from test_slurm import started\n"
    killed += f"started(Path({str(tmp_path)!r}), SDFT_SLURM_PORT='16950'); os.kill(os.getpid(), 9)"
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT / "tests"), str(ROOT)])
    done = subprocess.run([sys.executable, "-c", killed], env=os.environ | {"PYTHONPATH": path}, check=False)
    assert done.returncode == -9
    daemons = [int(file.read_text()) for file in (tmp_path / "pid").glob("*.pid")]
    assert len(daemons) == 5
    while any(alive(pid) for pid in daemons):
        time.sleep(0.2)


def alive(pid: int) -> bool:
    """Whether it runs; one that has ended may wait for its parent to notice."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
