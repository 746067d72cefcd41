"""receipt.json: enough to repeat a run, and to explain why another one has different results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from test_sweep import SMALL

import sdft.training.__main__ as train
from sdft.errors import UserError
from sdft.training import receipt

FILE = {"config": {"run_dir": "runs/a", "seed": 0}, "git": {}, "versions": {"torch": "1"}, "hardware": {},
        "threads": 2, "data": "d", "base_weights": "b", "outputs": {"lora": "1"}, "figures": {"loss": 0.5}}  # fmt: skip


def run(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    train.main()


def test_a_run_is_made_again_from_its_receipt(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    run(monkeypatch, *SMALL, "run_dir=first", "rank=2")
    record = json.loads((tmp_path / "first" / receipt.NAME).read_text())
    assert record["outputs"].keys() == {"lora", "lora_kohya"}
    assert record["threads"] == threads
    assert record["seed"] == 0
    capsys.readouterr()
    run(monkeypatch, "reproduce=first/receipt.json", "run_dir=second")
    assert "identical: lora, lora_kohya, every weight; and every metric" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "reproduce=first", "run_dir=third", "seed=1")
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert "the weights of lora, lora_kohya differ from the receipt" in printed
    assert "config.seed: 0 -> 1" in printed
    assert "run_dir" not in printed


def test_what_cannot_be_trained_is_refused_before_the_images_are_hashed(tmp_path: Path, monkeypatch, capsys) -> None:
    def hashed(*_: object) -> str:
        raise AssertionError("which takes minutes for a large folder")

    monkeypatch.setattr(receipt, "data_digest", hashed)
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *SMALL, f"run_dir={tmp_path}/run", "tuning=full", "model.dtype={unet: fp16}")
    assert stopped.value.code == 2
    assert "small updates are lost" in capsys.readouterr().err


def test_what_differs_is_named() -> None:
    other = {**FILE, "versions": {"torch": "2"}, "data": "e", "outputs": {"lora": "2"}}
    with pytest.raises(UserError, match=r"weights of lora .* versions.torch: 1 -> 2; data: d -> e"):
        receipt.compared(FILE, other)
    with pytest.raises(UserError, match="something in this run is not deterministic"):
        receipt.compared(FILE, {**FILE, "outputs": {"lora": "2"}})


def test_a_metric_that_differs_is_reported_though_the_weights_are_the_same() -> None:
    printed = receipt.compared(FILE, {**FILE, "figures": {"loss": 0.25}, "threads": 4})
    assert printed.startswith("identical: lora, every weight; but metrics differ: loss: 0.5 -> 0.25")
    assert "threads: 2 -> 4" in printed


def test_the_folder_of_a_run_is_no_difference() -> None:
    other = {**FILE, "config": {"run_dir": "runs/b", "seed": 0, "reproduce": "x"}}
    assert list(receipt.differences(FILE, other)) == []


def test_the_hash_of_weights_is_of_the_weights_alone(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.ones(2)}
    save_file(tensors, tmp_path / "x.safetensors", {"date": "today"})
    save_file(tensors, tmp_path / "y.safetensors", {"date": "tomorrow"})
    first, second = (receipt.weights_digest(tmp_path / f"{name}.safetensors") for name in "xy")
    assert first == second
    for changed in ({**tensors, "a": torch.arange(4.0) + 1e-6}, {"a": tensors["a"], "c": tensors["b"]}):
        save_file(changed, tmp_path / "z.safetensors")
        assert receipt.weights_digest(tmp_path / "z.safetensors") != first


def test_the_hash_of_the_data_follows_pictures_captions_and_order(tiny_source) -> None:
    def digest(**changes) -> str:
        source = tiny_source(3)
        source.__dict__ |= changes
        part, scan = SimpleNamespace(source=source), SimpleNamespace(digest=lambda index: None)
        return receipt.data_digest(SimpleNamespace(parts=lambda: [(part, scan), (part, scan)]))

    other = tiny_source(3).images.copy()
    other[1, 0, 0, 0] ^= 1
    hashes = {digest(), digest(images=other), digest(keys=["a", "b", "c"])}
    assert digest() == digest()
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "there is no such file"),
        ("{}", "did not finish"),
        ("[]", "must hold a JSON object, and holds a list"),
        ("\x00\x01", "is not valid JSON"),
        ('{"overrides": 3, "outputs": {}}', "its overrides are no list of texts"),
    ],
)
def test_a_receipt_that_is_none_is_refused(content: str | None, problem: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / receipt.NAME).write_text(content)
    with pytest.raises(UserError, match=problem):
        receipt.recalled([f"reproduce={tmp_path}"])


def test_a_command_without_a_receipt_stays_as_it_is(tmp_path: Path) -> None:
    assert receipt.recalled(["rank=4", "reproduce=null"]) == ["rank=4", "reproduce=null"]
    (tmp_path / receipt.NAME).write_text(json.dumps({"overrides": ["rank=4", "run_dir=a"], "outputs": {}}))
    assert receipt.recalled([f"reproduce={tmp_path}", "rank=8"]) == ["rank=4", f"reproduce={tmp_path}", "rank=8"]
