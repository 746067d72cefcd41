"""What TensorBoard reads of a run: the scalars of metrics.csv, pictures and the config, once for each step."""

from __future__ import annotations

import csv
import importlib.util
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_sweep import SMALL

import sdft
from sdft.training.callbacks.tensorboard import TensorBoard
from sdft.training.callbacks.tracking import log_comparison

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
WORDS = [word for word in SMALL if not word.startswith(("logger", "callbacks", "trainer.max_steps"))]
WORDS += ["logger=csv_tensorboard", "trainer.log_every=1", "trainer.validate_every=2", "lr_schedule=constant"]
WORDS += ["callbacks.previews.every=1", "callbacks.last.every=3", "callbacks.last.keep=2", "sampler.steps=1"]
WORDS += ["prompts=[a photo of a cat]"]


def read(run_dir: Path):
    """As TensorBoard does: all files of the folder in order, without what later ones have marked as dropped."""
    found = accumulator.EventAccumulator(str(run_dir / "tensorboard"), size_guidance=dict.fromkeys(SIZES, 0))
    return found.Reload()


SIZES = ("scalars", "images", "tensors")


def curves(run_dir: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value. No step has two values."""
    found = read(run_dir)
    result = {}
    for tag in found.Tags()["scalars"]:
        events = found.Scalars(tag)
        assert len({event.step for event in events}) == len(events), tag
        result[tag] = {event.step: event.value for event in events}
    return result


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    sdft.finetune([*WORDS, "trainer.max_steps=6", f"run_dir={folder}"])
    return folder


def test_scalars_are_those_of_the_csv(straight: Path) -> None:
    with (straight / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if value and name not in ("step", "epoch"):
                expected.setdefault(name, {})[int(row["step"])] = float(value)
    found = {tag: values for tag, values in curves(straight).items() if not tag.startswith("summary/")}
    assert {"train/loss", "val/eps_mse"} <= expected.keys()
    assert expected["train/loss"].keys() == set(range(6))
    assert found.keys() - {"epoch"} == expected.keys()
    for tag, values in expected.items():
        assert found[tag] == pytest.approx(values, rel=1e-6), tag


def test_pictures_config_and_summary_are_logged(straight: Path) -> None:
    found = read(straight)
    assert [event.step for event in found.Images("previews")] == [0, 1, 2, 3, 4]
    assert (found.Images("previews")[0].width, found.Images("previews")[0].height) == size(straight)
    (config,) = found.Tensors("config/text_summary")
    text = config.tensor_proto.string_val[0].decode()
    assert '"run_dir": ' in text
    assert '"git": ' in text
    assert found.Scalars("summary/num_steps")[0].value == 6
    assert "_hparams_/experiment" in found.summary_metadata


def size(run_dir: Path) -> tuple[int, int]:
    from PIL import Image

    with Image.open(run_dir / "previews" / "step_000001.png") as image:
        return image.size


def test_a_resumed_run_continues_the_curves(straight: Path, tmp_path: Path) -> None:
    """Its first part went on to step 4 after the checkpoint of step 3, as one that is killed."""
    sdft.finetune([*WORDS, "trainer.max_steps=4", f"run_dir={tmp_path}"])
    time.sleep(1)  # files of events are in the order of their seconds
    checkpoint = tmp_path / "checkpoints" / "step_000003.ckpt"
    sdft.finetune([*WORDS, "trainer.max_steps=6", f"run_dir={tmp_path}", f"resume={checkpoint}"])
    resumed, expected = curves(tmp_path), curves(straight)
    timed = {"summary/train_seconds"}
    assert resumed.keys() == expected.keys()
    for tag in expected.keys() - timed:
        assert resumed[tag] == expected[tag], tag
    assert [event.step for event in read(tmp_path).Images("previews")] == [0, 1, 2, 3, 4]


def test_without_the_package_it_is_named_before_the_data_are_read(tmp_path: Path, monkeypatch) -> None:
    def missing(name: str, *rest: object):
        return None if name == "tensorboard" else find(name, *rest)

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    words = ["logger=tensorboard", "data=folder", f"data.root={tmp_path / 'nowhere'}", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(sdft.UserError, match=r"logger=tensorboard: .*pip install 'sdft\[tensorboard\]'"):
        sdft.finetune(words)


def test_a_comparison_is_logged(straight: Path, tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_bytes((straight / "previews" / "step_000001.png").read_bytes())
    results = SimpleNamespace(figures={"base": {"adherence": SimpleNamespace(value=0.5)}})
    log_comparison(TensorBoard(str(tmp_path)), results, tmp_path)
    found = read(tmp_path)
    assert [(event.step, event.value) for event in found.Scalars("base/adherence")] == [(0, 0.5)]
    assert len(found.Images("grid")) == 1
