"""The commands of the README run, in its order, with fewer steps. Those that need a GPU or a cluster say so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from warm import WarmPython

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = {"make train", "make test", "make nano"}
"""`make test` runs this; CI runs it on a clean checkout. `make train` is the first experiment below."""
SHORT = {
    "train.py": ["trainer.max_steps=2", "sampler.steps=2", "logger=csv"],
    "eval.py": ["sampler.steps=2", "seeds=1"],
}
FEW_SCENES = ["data.validation.num_scenes=4", "reference.num_scenes=8"]
"""Of the toy world, held out."""
NUM_JUDGED = 3
"""Of the runs, the first ones (LoRA, full, new word) are judged, and the sweep; the others stop at the weights."""


def commands() -> list[str]:
    """Every command of the bash blocks, without the ones marked as needing what a laptop has not."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    runnable = [line for line in lines if "# needs a" not in line]
    return [command for line in runnable if (command := re.split(r"\s{2,}#", line)[0].strip()) not in ELSEWHERE]


def test_the_readme_has_commands() -> None:
    assert len(commands()) >= 10


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_runs(tmp_path: Path) -> None:
    for name in ("train.py", "eval.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    num_runs = 0
    with WarmPython() as python:
        for command in commands():
            program, *words = shlex.split(command)
            assert program == "python", f"how is this run? {command}"
            if words[0] in SHORT and "--cfg" not in words and not words[1].startswith("reproduce="):
                words += [w for w in SHORT[words[0]] if w.split("=")[0] not in {x.split("=")[0] for x in words}]
                if words[0] == "train.py":
                    num_runs += 1
                    words += [] if any(word.startswith("data=") for word in words) else FEW_SCENES
                    words.append("verdict.num_images=4" if num_runs <= NUM_JUDGED or "-m" in words else "verdict=none")
            status, printed = python.run(words, tmp_path)
            assert status == 0, f"{command}\n{printed[-6000:]}"


def test_the_picture_and_the_files_that_are_linked_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / link).exists(), link
