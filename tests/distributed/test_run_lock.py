"""One run folder, one process: what another process is told, here and on another machine; which locks are stale."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from small_runs import Run, finish, start, train_py

from sdft.distributed import run_lock as module
from sdft.distributed.run_lock import NAME, refuse_if_locked, run_lock
from sdft.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT", 0.1)
    monkeypatch.setattr(module, "STALE", 1.0)


OWNER = """
import sys, time
from pathlib import Path
from sdft.distributed import run_lock as module

module.BEAT = 0.1
if "elsewhere" in sys.argv:
    module.socket.gethostname = lambda: "node7"
    module._boot = lambda: "another boot"
    def no_locks(*_):
        raise OSError(95, "Operation not supported")
    module.fcntl.flock = no_locks
with module.run_lock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def owner(folder: Path, *words: str) -> subprocess.Popen[str]:
    """A process that owns the folder until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def recorded(folder: Path, **changes: Any) -> None:
    """Leaves a lock as a process that was killed does."""
    with run_lock(folder):
        content = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps(content | changes))


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_the_second_process_is_told_who_runs_there(where: str, tmp_path: Path) -> None:
    """On another machine there is no lock of the system that both see, only the file."""
    process = owner(tmp_path, where)
    host = "node7" if where == "elsewhere" else module.socket.gethostname()
    for attempt in (lambda: run_lock(tmp_path).__enter__(), lambda: refuse_if_locked(tmp_path)):
        with pytest.raises(UserError, match=rf"process {process.pid} on {host}, since 20\d\d-.* runs here; wait for"):
            attempt()
    process.communicate("")
    with run_lock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / NAME).exists()


def test_a_killed_owner_leaves_a_stale_lock(tmp_path: Path) -> None:
    process = owner(tmp_path)
    process.kill()
    process.wait()
    assert (tmp_path / NAME).is_file()
    began = time.monotonic()
    with run_lock(tmp_path):
        pass
    assert time.monotonic() - began < 0.5


def test_an_owner_on_another_machine_is_dead_if_its_count_stands_still(tmp_path: Path) -> None:
    recorded(tmp_path, host="node7", boot="another boot")
    began = time.monotonic()
    with run_lock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["host"] == module.socket.gethostname()
    assert time.monotonic() - began >= 1.0


def test_the_number_of_a_dead_process_may_belong_to_another(tmp_path: Path) -> None:
    """The lock says when its process began; a process of another start is not the owner."""
    recorded(tmp_path, pid=os.getppid(), began="1")
    with run_lock(tmp_path):
        pass


def test_a_living_process_of_this_machine_owns_even_without_locks_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = owner(tmp_path)

    def unsupported(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "flock", unsupported)
    with pytest.raises(UserError, match=f"process {process.pid} on "):
        run_lock(tmp_path).__enter__()
    process.communicate("")


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00\x01", '{"host": 1}', "7", "[" * 99999])
def test_a_lock_that_says_nothing_is_stale(text: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(text)
    with run_lock(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_the_owner_may_enter_again_and_other_ranks_need_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run_lock(tmp_path):
        with run_lock(tmp_path / "." / ""):
            pass
        assert (tmp_path / NAME).is_file()
    process = owner(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with run_lock(tmp_path):
        pass
    process.communicate("")


def _try(folder: str, begin: Any, results: Any) -> None:
    begin.wait()
    try:
        with run_lock(Path(folder)):
            time.sleep(0.5)
        results.put("ran")
    except UserError:
        results.put("left")


def test_of_many_that_start_together_one_runs(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    begin, results = context.Barrier(6), context.Queue()
    processes = [context.Process(target=_try, args=(str(tmp_path), begin, results)) for _ in range(6)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=20) for _ in processes) == ["left"] * 5 + ["ran"]
    for process in processes:
        process.join()


WORDS = [
    *("trainer.max_steps=500", "trainer.validate_every=500", "verdict=none", "~callbacks.previews", "logger=csv"),
    *("trainer.progress_bar=false", "data.batch_size=2", "data.train.num_scenes=4", "data.validation.num_scenes=2"),
]


def train_here(node: str | None, run: Run) -> None:
    """`train.py` with what it prints in `NODE.txt`; as on another machine without common locks, if a node is named."""
    if node is not None:
        module.socket.gethostname = lambda: node  # type: ignore[attr-defined]
        module._boot = lambda: f"boot of {node}"

        def unsupported(*_: Any) -> None:
            raise OSError(95, "Operation not supported")

        module.fcntl.flock = unsupported
    file = os.open(run.folder / f"{node or os.getpid()}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    train_py(WORDS, run)


@pytest.mark.parametrize("nodes", [(None, None), ("node1", "node2")])
def test_of_two_trainings_in_one_folder_one_trains_and_the_other_leaves(nodes: tuple, tmp_path: Path) -> None:
    """On one machine, and on two nodes that only share the files."""
    run = Run(tmp_path)
    (first,) = start(run, function=partial(train_here, nodes[0]))
    try:
        until = time.monotonic() + 60
        while not list(tmp_path.glob("metrics.csv")) and time.monotonic() < until:
            time.sleep(0.1)
        config = (tmp_path / ".hydra" / "overrides.yaml").read_text()
        (second,) = start(run, function=partial(train_here, nodes[1]))
        assert finish([second], 60) == [2]
        printed = (tmp_path / f"{nodes[1] or second.pid}.txt").read_text()
        assert f"process {first.pid} on {nodes[0] or module.socket.gethostname()}, since 20" in printed
        assert first.is_alive(), "it goes on"
        assert (tmp_path / ".hydra" / "overrides.yaml").read_text() == config
    finally:
        first.kill()
        first.join()
