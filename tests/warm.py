"""Runs commands as a shell would, but each in a fork of one process that has imported everything already.

A start of Python with torch, diffusers and lightning takes most of what a short command takes. What is run is the
same file with the same words in a process of its own; only the imports are shared.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# Imported, not used: no thread may run before the forks.
PRELOADED = (
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "sdft.training.callbacks.ema",
    "sdft.training.callbacks.export",
    "sdft.training.callbacks.previews",
    "sdft.config.command",
    "sdft.evaluation.page.write",
    "sdft.evaluation.after_training",
    "sdft.merging.merge",
    "sdft.module",
    "sdft.training.trainer",
)


class WarmPython:
    """A Python that has imported the project; `executable` starts it as any other, and so do the commands it runs."""

    def __init__(self, **environment: str):
        self._folder = tempfile.TemporaryDirectory()
        address, self.executable = f"{self._folder.name}/socket", f"{self._folder.name}/python"
        Path(self.executable).write_text(f'#!/bin/sh\nexec {sys.executable} -SE {__file__} {address} "$@"\n')
        Path(self.executable).chmod(0o755)
        self._server = subprocess.Popen(
            [sys.executable, __file__, "serve", address, self.executable],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._server.stdout.readline()

    def __enter__(self) -> WarmPython:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()
        self._folder.cleanup()

    def run(self, words: list[str], cwd: Path) -> tuple[int, str]:
        """Exit status of `python *words` in the folder `cwd`, and all that it printed."""
        return self.together([(words, {})], cwd)[0]

    def complete(self, words: list[str], cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
        """The same, with standard output and standard error apart. more: added to the environment."""
        command, environment = [self.executable, *words], {**os.environ, **more}
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    def together(self, commands: list[tuple[list[str], dict[str, str]]], cwd: Path) -> list[tuple[int, str]]:
        """The same of several commands that run side by side, each with words and what its environment has more."""
        processes = [
            subprocess.Popen(
                [self.executable, *words],
                cwd=cwd,
                env={**os.environ, **more},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            for words, more in commands
        ]
        printed = [process.communicate()[0] for process in processes]
        return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]


def serve(address: str, executable: str) -> None:
    """Fork a process for each request and send back its exit status, until standard input ends."""
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    asking: dict[int, socket.socket] = {}
    while sys.stdin not in (ready := select.select([listener, sys.stdin], [], [], 0.02)[0]):
        if ready:
            asker, _ = listener.accept()
            message, places, _, _ = socket.recv_fds(asker, 1 << 20, 2, socket.MSG_WAITALL)
            if not (child := os.fork()):
                become(**json.loads(message), places=places, executable=executable)
            for place in places:
                os.close(place)
            asking[child] = asker
        while asking and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            asker = asking.pop(ended[0])
            asker.sendall(str(os.waitstatus_to_exitcode(ended[1])).encode())
            asker.close()
    for child in asking:
        os.kill(child, signal.SIGKILL)


def ask(address: str, words: list[str]) -> int:
    """What `executable` does: `python *words` by the server, with this process's folder, environment and output."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        message = json.dumps({"words": words, "cwd": os.getcwd(), "environment": dict(os.environ)})
        socket.send_fds(server, [message.encode()], [1, 2])
        server.shutdown(socket.SHUT_WR)
        return int(server.recv(16) or 1)


def become(words: list[str], cwd: str, environment: dict[str, str], places: list[int], executable: str) -> None:
    """Be `python *words`; does not return."""
    import runpy
    import traceback

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, place in zip((1, 2), places, strict=True):
        os.dup2(place, number)
    sys.executable = executable
    # As Python does at its start: the folder of the script, or the one it was called from, then PYTHONPATH.
    sys.path[0] = cwd if words[0] == "-m" else str(Path(cwd, words[0]).resolve().parent)
    sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    status = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code)
    except BaseException:
        traceback.print_exc()
        status = 1
    # As at the end of any process: what was registered is run, what was printed is written.
    import atexit

    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    else:
        status = ask(sys.argv[1], sys.argv[2:])
        if status < 0:  # as the command ended, by a signal
            os.kill(os.getpid(), -status)
        sys.exit(status)
