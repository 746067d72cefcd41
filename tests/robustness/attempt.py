"""One command that may go wrong, and whether what came of it is right."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warm import WarmPython

ROOT = Path(__file__).resolve().parents[2]
OLD_RUN = ROOT / "tests" / "fixtures" / "run_of_version_0_1"
SECONDS = 90
MAX_LINES = 25
"""Lists of weights that do not fit have one line each."""
MARK = "the_attack_ran"
TRAIN, EVAL = [str(ROOT / "train.py")], [str(ROOT / "eval.py")]
MERGE, FORMATS = ["-m", "sdft.merging"], ["-m", "sdft.formats"]
SHORT = ["trainer.max_steps=1", "verdict=none", "~callbacks.previews", "logger=csv", "run_dir=run"]
SHORT += ["trainer.progress_bar=false", "data.train.num_scenes=4", "data.validation.num_scenes=2"]
ONE_IMAGE = ["prompts=[cat]", "seeds=1", "sampler.steps=1", "run_dir=compared", "size=32"]


@dataclass(frozen=True)
class Try:
    """One command, and what must come of it."""

    kind: str
    name: str
    words: Sequence[str]
    prepare: Callable[[Path], Any] = lambda folder: None
    """Makes the files in the folder in which the command is called."""
    code: int | None = 2
    """The exit code; None if the command may be done as well as refused."""
    says: str = ""
    """What the message has in it; of a command that may be done, only its refusal."""
    environment: dict[str, str] = field(default_factory=dict)


def outcome(one: Try, python: WarmPython) -> str:
    """What did not hold; empty if all did."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one.prepare(folder)
        before = files_in(folder)
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", **one.environment}
        command = ["timeout", "-s", "KILL", str(SECONDS), python.executable, *one.words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")
        errors = done.stderr.split("\r")[-1]
        lines = [line for line in errors.splitlines() if line.strip()]
        if done.returncode in (-9, 137):
            return f"took more than {SECONDS} s"
        if any(folder.rglob(MARK)) or (ROOT / MARK).exists():
            return "the attack ran"
        if "\x1b" in done.stdout + done.stderr:
            return "the terminal is given a control sequence"
        if "Traceback" in done.stdout + done.stderr:
            return f"a traceback: {lines[-1][:200]}"
        if done.returncode not in (0, 2) or (one.code is not None and done.returncode != one.code):
            return f"exit code {done.returncode}: {' | '.join(lines[-3:])[:300]}"
        if done.returncode == 2 and not any(line.startswith("error") for line in lines):
            return f"no line with the error: {' | '.join(lines[-3:])[:200]}"
        if len(lines) > MAX_LINES:
            return f"{len(lines)} lines of error: {lines[-1][:100]}"
        after = files_in(folder)
        if other := [name for name, content in before.items() if after.get(name) != content]:
            return f"changed or removed {', '.join(other)[:200]}"
        if (one.code is None and done.returncode == 0) or one.says in done.stderr + done.stdout:
            return ""
        return f"does not say {one.says!r}: {' | '.join(lines)[:300]}"


def files_in(folder: Path) -> dict[str, bytes]:
    """Relative path -> the content's hash, of each file below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest() for path in files}
