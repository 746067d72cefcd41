"""Runs that start from a merge, and from a base with LoRAs baked in: the weights, the record of them, and refusals."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_sweep import SMALL

import sdft
from sdft.config.command import compose
from sdft.data.cache import fingerprint
from sdft.data.scan_cache import user_cache
from sdft.errors import UserError
from sdft.evaluation.subject_loader import SubjectLoader
from sdft.evaluation.subjects import read_subjects
from sdft.models.load import pretrained

SHORT = [*SMALL, "base_lr=1e-2"]
RECIPE = """steps:
  merged:
    method: add
    base: nano
    delta: LORA
    scale: 3.0
"""


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a LoRA that changes something."""
    folder = tmp_path_factory.mktemp("lora")
    sdft.finetune([*SHORT, f"run_dir={folder}"])
    return folder


@pytest.fixture(scope="module")
def recipe(lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(RECIPE.replace("LORA", str(lora / "lora.safetensors")))
    return file


def test_a_lora_on_a_baked_base_says_so_and_is_refused_on_another(lora: Path, tmp_path: Path) -> None:
    option = f"model.loras=[{{lora: {lora}, scale: 2.0}}]"
    run = sdft.finetune([*SHORT, option, f"run_dir={tmp_path}"])
    recorded = run.receipt["starts_from"]["baked"]
    assert [(one["lora"], one["scale"]) for one in recorded] == [("lora.safetensors", 2.0)]
    for name in ("lora", "lora_kohya"):
        with safe_open(run.artifacts[name], "pt") as file:
            assert json.loads(file.metadata()["sdft.base_loras"]) == recorded
    (subject,) = read_subjects({"tuned": str(tmp_path)})
    plain = SubjectLoader(partial(pretrained, weights="nano"), "nano", torch.device("cpu"))
    with pytest.raises(UserError, match=r"trained on a base with others baked in \(lora\.safetensors at 2\); pass"):
        plain.open(subject).__enter__()
    same = partial(pretrained, weights="nano", loras=[{"lora": str(lora), "scale": 2.0}])
    with SubjectLoader(same, "nano", torch.device("cpu")).open(subject):
        pass
    assert len({str(SubjectLoader(load, "nano", torch.device("cpu")).identity(subject, 1.0, -1))
                for load in (same, partial(pretrained, weights="nano"))}) == 2  # fmt: skip


@pytest.mark.slow
def test_a_full_tuning_of_a_baked_base_is_complete(lora: Path, tmp_path: Path) -> None:
    option = f"model.loras=[{{lora: {lora}, scale: 2.0}}]"
    run = sdft.finetune([*SHORT, "tuning=full", "base_lr=1e-12", option, f"run_dir={tmp_path}"])
    baked = pretrained("nano", loras=[{"lora": str(lora), "scale": 2.0}])
    found, expected = pretrained(str(run.artifacts["model"])).state_dict(), baked.state_dict()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6), name


def test_a_run_starts_from_what_merging_writes(recipe: Path, lora: Path, tmp_path: Path) -> None:
    sdft.merge("recipe", file=recipe, out=tmp_path / "merged")
    by_hand = sdft.finetune([*SHORT, f"model.weights={tmp_path / 'merged'}", f"run_dir={tmp_path / 'by_hand'}"])
    words = [*SHORT, f"model.merge_recipe={recipe}"]
    run = sdft.finetune([*words, f"run_dir={tmp_path / 'run'}"])
    assert (
        run.receipt["base_weights"]
        == by_hand.receipt["base_weights"]
        == fingerprint(pretrained(str(tmp_path / "merged")))
    )
    assert run.receipt["base_weights"] != fingerprint(pretrained("nano"))
    assert run.receipt["outputs"] == by_hand.receipt["outputs"]
    assert run.receipt["starts_from"]["merged"]["recipe"] == "recipe.yaml"
    with safe_open(run.artifacts["lora"], "pt") as file:
        assert json.loads(file.metadata()["sdft.base_merge"]) == run.receipt["starts_from"]["merged"]
    (cached,) = [path for path in (user_cache() / "merged").iterdir() if path.is_dir()]
    written = (cached / "model_index.json").stat().st_mtime_ns
    again = sdft.finetune([*words, f"run_dir={tmp_path / 'again'}"])
    assert again.receipt["outputs"] == run.receipt["outputs"]
    assert (cached / "model_index.json").stat().st_mtime_ns == written


@pytest.mark.slow
def test_a_run_from_a_merge_is_resumed_with_the_same_bits(recipe: Path, tmp_path: Path) -> None:
    words = [*SHORT, f"model.merge_recipe={recipe}", "lr_schedule=constant", "callbacks.last.every=1"]
    words = [word for word in words if not word.startswith("trainer.max_steps")]
    straight = sdft.finetune([*words, "trainer.max_steps=3", f"run_dir={tmp_path / 'a'}"])
    sdft.finetune([*words, "trainer.max_steps=1", f"run_dir={tmp_path / 'b'}"])
    resumed = sdft.finetune([*words, "trainer.max_steps=3", f"run_dir={tmp_path / 'b'}", "resume=auto"])
    assert resumed.receipt["outputs"] == straight.receipt["outputs"]


def test_what_cannot_be_merged_is_refused_by_its_key(recipe: Path, lora: Path, tmp_path: Path) -> None:
    cases = {
        "steps:\n  sum: {method: difference, a: nano, b: nano}\n": "its result is a LoRA; end it with the method add",
        RECIPE.replace("LORA", str(tmp_path / "none.safetensors")): "there is no such file",
        "steps: 3\n": "has no `steps:`",
    }
    for text, complaint in cases.items():
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=rf"model\.merge_recipe={tmp_path / 'bad.yaml'}: .*{complaint}"):
            sdft.finetune([*SHORT, f"model.merge_recipe={tmp_path / 'bad.yaml'}", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=rf"model\.merge_recipe={tmp_path / 'gone.yaml'}: .*cannot be read"):
        sdft.finetune([*SHORT, f"model.merge_recipe={tmp_path / 'gone.yaml'}", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"this command does not merge; write it with python -m sdft\.merging"):
        pretrained("nano", merge_recipe=str(recipe))


def test_a_dry_run_merges_nothing(recipe: Path, lora: Path, tmp_path: Path, python) -> None:
    (tmp_path / "again.yaml").write_text(recipe.read_text().replace("3.0", "1.25"))
    before = sorted((user_cache() / "merged").glob("*"))
    words = [*SHORT, f"model.merge_recipe={tmp_path / 'again.yaml'}", f"model.loras=[{{lora: {lora}}}]", "dry_run=true"]
    status, printed = python.run(["train.py", *words], Path(__file__).parents[2])
    assert status == 0, printed
    assert "nothing is trained or written" in printed
    assert sorted((user_cache() / "merged").glob("*")) == before


def test_the_real_model_takes_both() -> None:
    cfg = compose("train", ["model=sdxl", "model.merge_recipe=r.yaml", "model.loras=[{lora: x, scale: 0.5}]",
                            "data=folder", "data.root=x"])  # fmt: skip
    assert cfg.model.loras[0].scale == 0.5
    with pytest.raises(UserError, match=r"model\.loras"):
        sdft.finetune(["model.loras=[{lora: x, weight: 0.5}]"])
