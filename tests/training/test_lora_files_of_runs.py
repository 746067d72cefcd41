"""LoRA files that are written during a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_runs import Run, result, train
from tiny import SIZE

from sdft.config.command import check, compose
from sdft.errors import UserError
from sdft.formats.adapter import read_words
from sdft.training.callbacks.lora_files import LoraFiles
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full
from sdft.tuning.words import Words


def run(folder: Path, every: int = 2, options: dict[str, Any] | None = None, **more: Any) -> Run:
    callback = LoraFiles(str(folder), "mine", SIZE, every, **(options or {}))
    return Run(folder, callbacks=[callback], **{"max_steps": 6, "export": True, **more})


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*"))


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return opened.metadata()


def assert_same_tensors(a: Path, b: Path) -> None:
    ours, theirs = load_file(a), load_file(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_last_file_is_the_exported_lora_and_others_are_of_their_steps(tmp_path: Path) -> None:
    """The average is in both: the tiny runs have one."""
    one, plain = run(tmp_path / "one"), Run(tmp_path / "plain", max_steps=6)
    weights = train(one)["weights"]
    for name, weight in train(plain)["weights"].items():
        assert torch.equal(weight, weights[name])
    files = [tmp_path / "one" / "loras" / f"mine-step0000000{step}.safetensors" for step in (2, 4, 6)]
    assert names(tmp_path / "one" / "loras") == [file.name for file in files]
    exported = tmp_path / "one" / "lora_kohya.safetensors"
    assert_same_tensors(files[-1], exported)
    first, last = load_file(files[0]), load_file(files[-1])
    assert any(not torch.equal(first[name], last[name]) for name in first)
    told, expected = metadata(files[-1]), metadata(exported)
    assert told.pop("ss_steps") == "6"
    apart = ("modelspec.date", "modelspec.title", "ss_output_name")
    assert {k: v for k, v in told.items() if k not in apart} == {k: v for k, v in expected.items() if k not in apart}
    assert told["modelspec.title"] == "mine"


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, [1, 2, 3, 4, 5, 6]), ({"keep": 2}, [5, 6]), ({"keep": 1, "keep_every": 3}, [3, 6])],
)
def test_retention(options: dict[str, Any], kept: list[int], tmp_path: Path) -> None:
    callback = LoraFiles(str(tmp_path), "mine", SIZE, 1, **options)
    (tmp_path / "loras" / "embeddings").mkdir(parents=True)
    other = ["mine-2-step00000001.safetensors", "mine.safetensors", "mine-step00000009.safetensors"]
    for name in other:  # of other runs, and of a step that is still to come
        (tmp_path / "loras" / name).touch()
    for step in range(1, 7):
        (tmp_path / "loras" / f"mine-step{step:08d}.safetensors").touch()
        (tmp_path / "loras" / "embeddings" / f"_sks_-step{step:08d}.safetensors").touch()
        callback._remove_old(step, ["<sks>"])
    assert names(tmp_path / "loras") == sorted(["embeddings", *other, *(f"mine-step{n:08d}.safetensors" for n in kept)])
    assert names(tmp_path / "loras" / "embeddings") == [f"_sks_-step{n:08d}.safetensors" for n in kept]


def test_diffusers_loads_a_file(tiny_model, tmp_path: Path) -> None:
    one = run(tmp_path / "one", max_steps=2)
    train(one)
    pipeline = tiny_model().pipeline()
    pipeline.load_lora_weights(tmp_path / "one" / "loras" / "mine-step00000002.safetensors")
    assert pipeline.get_active_adapters() == ["default_0"]


@pytest.mark.slow
def test_a_resumed_run_writes_the_same_files(tmp_path: Path) -> None:
    """It goes on from step 3, below the file of step 4: that stays until it is written again."""
    folder = tmp_path / "one"
    train(run(folder, keep=2))
    whole = {file.name: load_file(file) for file in (folder / "loras").glob("*.safetensors")}
    foreign = folder / "loras" / "mine-step00000004.safetensors"
    foreign.unlink()  # which is mapped
    foreign.write_bytes(b"of another run")
    train(run(folder, resume=folder / "checkpoints" / "step_000003.ckpt"))
    assert names(folder / "loras") == sorted(whole)
    for name, tensors in whole.items():
        again = load_file(folder / "loras" / name)
        assert all(torch.equal(tensor, again[key]) for key, tensor in tensors.items()), name


@pytest.mark.slow
def test_sharded_weights_are_gathered(tmp_path: Path) -> None:
    options = {"tuning": "lora_unet_te", "tuning_options": {"init": "pissa"}, "max_steps": 4}
    sharded = run(tmp_path / "fsdp", strategy="fsdp", **options)
    result(sharded, world_size=2)
    assert_same_tensors(
        tmp_path / "fsdp" / "loras" / "mine-step00000004.safetensors", tmp_path / "fsdp" / "lora_kohya.safetensors"
    )
    embeddings = [f"_sks_-step0000000{step}.safetensors" for step in (2, 4)]
    assert names(tmp_path / "fsdp" / "loras" / "embeddings") == embeddings


def test_words_alone_have_files_of_their_own(tmp_path: Path) -> None:
    train(run(tmp_path / "words", tuning="words", max_steps=2, export=False))
    assert names(tmp_path / "words" / "loras") == ["embeddings"]
    file = tmp_path / "words" / "loras" / "embeddings" / "_sks_-step00000002.safetensors"
    assert read_words(file).vectors == {"<sks>": 1}


def test_full_tuning_is_refused_with_what_to_do_instead() -> None:
    with pytest.raises(
        UserError, match=r"callbacks\.lora_files\.every=5: full fine-tuning .* callbacks=progress .*Model"
    ):
        LoraFiles("run", "mine", 64, 5).check_tuning(Full())
    LoraFiles("run", "mine", 64).check_tuning(Full())
    for tuning in (Adapter(rank=2), Words({"<sks>": "cat"})):
        LoraFiles("run", "mine", 64, 5).check_tuning(tuning)


def test_one_override_turns_it_on() -> None:
    cfg = compose("train", ["callbacks.lora_files.every=200", "name=ink"])
    check(cfg)
    assert (cfg.callbacks.lora_files.every, cfg.callbacks.lora_files.name) == (200, "ink")
    assert compose("train").callbacks.lora_files.every is None
