"""Runs commands as a shell would, but each in a fork of one process that has imported everything already.

A start of Python with torch, diffusers and lightning takes most of what a short command takes. What is run is the
same file with the same words in a process of its own; only the imports are shared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

# Imported, not used: no thread may run before the forks.
PRELOADED = (
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "sdft.callbacks.ema",
    "sdft.callbacks.exports",
    "sdft.callbacks.previews",
    "sdft.config",
    "sdft.evaluation.page.write",
    "sdft.evaluation.verdict",
    "sdft.merging.merge",
    "sdft.module",
    "sdft.trainer",
)


class WarmPython:
    """A Python that has imported the project, from which commands are forked one after the other."""

    def __init__(self, **environment: str):
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> WarmPython:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def run(self, words: list[str], cwd: Path) -> tuple[int, str]:
        """Exit status of `python *words` in the folder `cwd`, and all that it printed."""
        return self.together([(words, {})], cwd)[0]

    def together(self, commands: list[tuple[list[str], dict[str, str]]], cwd: Path) -> list[tuple[int, str]]:
        """The same of several commands that run side by side, each with its words and its environment."""
        printed = [cwd / f"printed_{time.monotonic_ns()}_{number}.txt" for number in range(len(commands))]
        asked = [
            {"words": words, "environment": environment, "cwd": str(cwd), "printed": str(file)}
            for (words, environment), file in zip(commands, printed, strict=True)
        ]
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        statuses = json.loads(self._server.stdout.readline())
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in printed]
        for file in printed:
            file.unlink()
        return list(zip(statuses, texts, strict=True))


def serve() -> None:
    """For each line of standard input, fork a process for each of its commands, and answer with their exit statuses."""
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    for line in sys.stdin:
        children = []
        for command in json.loads(line):
            children.append(os.fork())
            if not children[-1]:
                become(**command)
        print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)


def become(words: list[str], environment: dict[str, str], cwd: str, printed: str) -> None:
    """Be `python *words`; does not return."""
    import runpy
    import traceback

    os.environ |= environment
    os.chdir(cwd)
    with open(printed, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
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
    serve()
