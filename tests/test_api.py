"""The Python API: docs/python_api.md runs as it stands, silently, and leaves the process as it was."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from PIL import Image

import sdft
from sdft.api import CompareResult, FinetuneResult, MergeResult, _value
from sdft.training import receipt

PAGE = Path(__file__).parents[1] / "docs" / "python_api.md"
TINY = ["verdict=none", "trainer.max_steps=2", "data.train.num_scenes=4", "data.validation.num_scenes=2"]


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The names that the page's blocks leave, all run in order in one folder."""
    folder, before = tmp_path_factory.mktemp("documented"), Path.cwd()
    names: dict = {}
    os.chdir(folder)
    try:
        for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
            exec(compile(block, str(PAGE), "exec"), names)
    finally:
        os.chdir(before)
    names["folder"] = folder
    return names


@pytest.mark.slow
def test_the_page_runs_and_returns_what_it_documents(documented: dict) -> None:
    run, folder = documented["run"], documented["folder"]
    assert isinstance(run, FinetuneResult)
    assert isinstance(run.metrics["style_gain"], float)
    assert run.metrics["num_steps"] == 4
    assert run.artifacts["lora"].is_file()
    assert run.run_dir.parent == folder / "runs" / "dreamy_style"
    assert documented["edited"].summary["num_steps"] == 3
    assert documented["edited"].run_dir.parent == folder / "runs" / "edited"
    images = documented["images"]
    assert [type(image) for image in images] == [Image.Image] * 2
    assert [image.size for image in images] == [(128, 128)] * 2
    assert isinstance(documented["merged"], MergeResult)
    assert documented["merged"].path == folder / "runs" / "blend"
    assert all(file.is_file() for file in documented["merged"].written)
    result = documented["result"]
    assert isinstance(result, CompareResult)
    assert {name: len(images) for name, images in result.images.items()} == {"base": 4, "blend": 4, "dreamy": 4}
    assert result.metrics["blend"].keys() == result.results.figures["blend"].keys() != set()
    assert (result.run_dir / "report.html").is_file()


@pytest.mark.slow
def test_the_receipt_records_overrides_or_the_config(documented: dict) -> None:
    run, edited = documented["run"], documented["edited"]
    assert run.receipt["overrides"][:2] == ["logger=csv", "experiment=dreamy_style"]
    record = json.loads((edited.run_dir / receipt.NAME).read_text())
    assert record["overrides"] is None
    assert record["config"]["optimizer"]["lr"] == 2e-4
    with pytest.raises(sdft.UserError, match="started from Python"):
        receipt.recalled([f"reproduce={edited.run_dir}"])


@pytest.mark.slow
def test_a_run_from_a_config_is_made_again(documented: dict, tmp_path: Path) -> None:
    again = sdft.finetune([f"reproduce={documented['edited'].run_dir}", f"run_dir={tmp_path / 'again'}"])
    assert again.receipt["outputs"] == documented["edited"].receipt["outputs"]
    assert again.run_dir == tmp_path / "again"
    assert not (tmp_path / "again" / "wandb").exists()


@pytest.mark.slow
def test_adapters_stay_on_the_loaded_model(documented: dict) -> None:
    run = documented["run"]
    base, tuned, off = (
        np.asarray(sdft.sample(sdft.load_model("nano", **options), "a photo of a cat", steps=2)[0])
        for options in ({}, {"lora": run.artifacts["lora"], "scale": 50.0}, {"lora": run.run_dir, "scale": 0.0})
    )
    assert (base != tuned).any()
    assert (base == off).all()


def test_seeds_count_up_from_the_given_one() -> None:
    model = sdft.load_model("nano")
    first = sdft.sample(model, ["a photo of a cat"] * 2, seed=3, steps=2)
    second = sdft.sample(model, "a photo of a cat", seed=4, steps=2)
    assert np.abs(np.asarray(first[1], dtype=int) - np.asarray(second[0], dtype=int)).max() <= 1
    assert np.asarray(first[0]).tolist() != np.asarray(second[0]).tolist()


def test_a_run_prints_nothing_and_leaves_the_process_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        theirs = GlobalHydra.instance().hydra
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        before = sys.argv[:], Path.cwd(), torch.get_num_threads(), torch.backends.cuda.flash_sdp_enabled()
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()

        async def notebook() -> FinetuneResult:
            return sdft.finetune(TINY)

        run = asyncio.run(notebook())
        assert GlobalHydra.instance().hydra is theirs
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert before == (sys.argv, Path.cwd(), torch.get_num_threads(), torch.backends.cuda.flash_sdp_enabled())
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert capfd.readouterr() == ("", "")
    assert run.summary["num_steps"] == 2
    assert not list(tmp_path.rglob("wandb*"))


def test_verbose_prints_what_the_command_prints(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sdft.merge("weighted_sum", a="nano", b="nano", out=tmp_path / "out", dry_run=True, verbose=True)
    printed = capfd.readouterr().out
    result = sdft.merge("weighted_sum", a="nano", b="nano", out=tmp_path / "out", dry_run=True)
    assert printed == "".join(f"{line}\n" for line in result.lines)
    assert "tensors" in printed
    assert capfd.readouterr() == ("", "")
    assert result.written == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sdft.finetune(["experiment=dreamy_styel"]), "did you mean 'dreamy_style'"),
        (lambda: sdft.finetune(["trainer.max_steps=0"]), "trainer.max_steps=0: must be greater than or equal to 1"),
        (lambda: sdft.finetune(["trainer.devices=2"]), "trainer.devices=2"),
        (lambda: sdft.compose("trian"), "did you mean 'train'"),
        (lambda: sdft.load_model("nano", lora="typo.safetensors"), "load_model.*typo.safetensors"),
        (lambda: sdft.load_model("no/such/folder"), "no/such/folder"),
        (lambda: sdft.load_model("nano", dtype="fp8"), "model.dtype.*fp8"),
        (lambda: sdft.merge("weighted_sum", a="nano", out="x"), "b is not set"),
        (lambda: sdft.merge("weighted_summ", a="nano"), "did you mean 'weighted_sum'"),
        (lambda: sdft.compare({"base": "typo/of/a/run"}), "subjects.base=typo/of/a/run"),
        (lambda: sdft.compare({"base": "nano"}, promts=["a cat"]), "unknown key 'promts'.*prompts"),
    ],
)
def test_errors_are_those_of_the_commands(call, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sdft.UserError, match=message):
        call()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_edited_config_is_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = sdft.compose("train", TINY)
    assert isinstance(cfg, DictConfig)
    cfg.optimizer.lr = "quick"
    with pytest.raises(sdft.UserError, match=r"optimizer.lr=quick"):
        sdft.finetune(cfg)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_sampler_is_reported() -> None:
    model = sdft.load_model("nano")
    with pytest.raises(sdft.UserError, match="euler"):
        sdft.sample(model, "a cat", sampler="eulr")
    with pytest.raises(sdft.UserError, match=r"sampler.steps=0"):
        sdft.sample(model, "a cat", steps=0)


@pytest.mark.parametrize(
    "value",
    ["it's", "a\\b", "ends in \\", "\\'", "a, b: {c} [d] = $e", "", None, True, 3, 1e-5, ["a", 1], {"k": "v w"}],
)
def test_values_come_through_overrides_as_they_are(value: object) -> None:
    (parsed,) = OverridesParser.create().parse_overrides([f"key={_value(value)}"])
    assert parsed.value() == value


def test_importing_the_package_is_cheap() -> None:
    code = "import sdft, sys; assert 'compare' in dir(sdft); assert not {'torch', 'hydra', 'PIL'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'finetun'"):
        sdft.finetun  # noqa: B018
