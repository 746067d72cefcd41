"""The wheel, installed into an empty environment: its commands work from any folder, with the configs it carries."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
Run = Callable[..., str]
OWN = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
"""Without what would make this checkout importable: pip would find it installed, and the commands would run it."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, as building leaves folders beside them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("sdft", "conf", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(out), str(source)]
    subprocess.run([sys.executable, *command], check=True, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with the wheel, and all that is installed here but sdft."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    own = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    command = ["-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([sys.executable, *command, str(wheel)], check=True, env=OWN)
    # The path only: the .pth files there, of the editable sdft among others, are not read.
    (own / "installed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


@pytest.fixture
def run(environment: Path, tmp_path: Path) -> Run:
    """Runs a program of the environment in an empty folder; returns what it printed."""
    def call(program: str, *words: str) -> str:
        done = subprocess.run(
            [str(environment / "bin" / program), *words],
            cwd=tmp_path, env=OWN, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


def test_the_wheel_carries_configs_and_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    parts = {"conf": ROOT / "conf", **{part: ROOT / "sdft" / part for part in ("models/nano", "models/sdxl_base")}}
    pages = ("board/page", "captioning/page", "data/page", "evaluation/page", "pages")
    parts |= {page: ROOT / "sdft" / page for page in pages}
    for part, folder in parts.items():
        left_out = {"__pycache__"}
        files = [file for file in folder.rglob("*") if file.is_file() and left_out.isdisjoint(file.parts)]
        assert files
        assert {f"sdft/{part}/{file.relative_to(folder).as_posix()}" for file in files} <= names
    assert not {name.split("/")[0] for name in names} - {"sdft", wheel.name.replace("-py3-none-any.whl", ".dist-info")}


def test_the_wheel_is_what_is_imported(run: Run, environment: Path, wheel: Path) -> None:
    code = "import sdft, sdft.config.command as c; print(sdft.__file__, c.CONF_DIR, sdft.__version__)"
    file, conf, version = run("python", "-c", code).split()
    assert Path(file).is_relative_to(environment)
    assert Path(conf).is_relative_to(environment)
    assert wheel.name.startswith(f"sdft-{version}-")


def test_train(run: Run, tmp_path: Path) -> None:
    words = ["trainer.max_steps=2", "verdict=none", "logger=csv", "name=mine", "trainer.progress_bar=false"]
    printed = run("sdft-train", *words, "data.train.num_scenes=4", "data.validation.num_scenes=2")
    (lora,) = tmp_path.glob("runs/mine/*/lora.safetensors")
    assert f"runs/mine/{lora.parent.name}" in printed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["runs"]


def test_the_module_is_the_same_command(run: Run, tmp_path: Path) -> None:
    printed = run("python", "-m", "sdft.training", "experiment=dreamy_style", "dry_run=true")
    assert "nothing is trained or written" in printed
    assert list(tmp_path.iterdir()) == []


def test_eval(run: Run, tmp_path: Path) -> None:
    run("sdft-eval", "subjects={base: nano}", "prompts=[a photo of a cat]", "sampler.steps=2", "run_dir=seen")
    assert (tmp_path / "seen" / "report.html").is_file()
    assert len([*(tmp_path / "seen" / "pictures").glob("*.png")]) == 1


def test_merge(run: Run, tmp_path: Path) -> None:
    run("sdft-merge", "a=nano", "b=nano", "out=blend")
    assert (tmp_path / "blend" / "model_index.json").is_file()


def test_data(run: Run, tmp_path: Path) -> None:
    run("sdft-data", "toy", "out=toy", "count=2")
    assert sorted(file.name for file in (tmp_path / "toy").iterdir()) == [
        "00000.png", "00000.txt", "00001.png", "00001.txt",
    ]  # fmt: skip


def test_formats(run: Run, tmp_path: Path) -> None:
    module = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    factors = {"lora_A": np.ones((2, 640), np.float16), "lora_B": np.ones((640, 2), np.float16)}
    save_file({f"{module}.{name}.weight": factor for name, factor in factors.items()}, tmp_path / "small.safetensors")
    run("sdft-formats", "in=small.safetensors", "out=kohya.safetensors", "to=kohya")
    assert any(name.startswith("lora_unet_") for name in load_file(tmp_path / "kohya.safetensors"))
