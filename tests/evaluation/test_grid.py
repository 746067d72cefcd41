"""The grid: every axis is free, some compete, and wrong values are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdft.errors import UserError
from sdft.evaluation.grid import Axes, build_grid, read_prompts
from sdft.evaluation.subjects import FINAL, AdapterFiles, Subject
from sdft.sampling.samplers import Sampler

BASE = Subject("base", "nano", weights="nano")
MINE = Subject("mine", "lora", adapters=(AdapterFiles(Path("lora.safetensors")),))
SAMPLER = Sampler("euler", steps=4, cfg=3.0)


def grid(axes: Axes, compete=(), subjects=(BASE, MINE), prompts=("a", "b"), seeds=(0, 1)):
    return build_grid(subjects, prompts, seeds, SAMPLER, 64, axes, compete)


def test_without_axes_every_subject_draws_every_prompt_from_every_seed() -> None:
    found = grid(Axes())
    assert [(c.variant, c.settings.prompt, c.settings.seed) for c in found] == [
        (name, prompt, seed) for name in ("base", "mine") for prompt in "ab" for seed in (0, 1)
    ]
    assert {(c.settings.sampler, c.settings.steps, c.settings.cfg, c.settings.size_hw) for c in found} == {
        ("euler", 4, 3.0, (64, 64))
    }
    assert found[0].axes == {"prompt": "a", "seed": 0}


def test_axes_multiply_and_make_pairs() -> None:
    axes = Axes(sampler=["euler", "ddim"], cfg=[1, 5], steps=[2], negative=["", "x"], size=[32, [32, 48]])
    found = grid(axes, subjects=[MINE])
    assert len(found) == 2 * 2 * 1 * 2 * 2 * 4
    assert found[-1].axes == {
        "prompt": "b", "seed": 1, "sampler": "ddim", "cfg": 5, "negative": "x", "size": "48x32"
    }  # fmt: skip
    assert found[-1].settings.size_hw == (32, 48)
    assert found[-1].settings.steps == 2
    assert len({c.pair for c in found}) == len(found)


def test_what_competes_is_a_subject_of_its_own_and_the_base_has_no_strength() -> None:
    found = grid(Axes(scale=[0.5, 1.0]), compete=["scale"], prompts=["a"], seeds=[0])
    assert [c.variant for c in found] == ["base", "mine scale 0.5", "mine scale 1"]
    assert [c.scale for c in found] == [1.0, 0.5, 1.0]
    assert {c.pair for c in found} == {(("prompt", "a"), ("seed", 0))}
    assert found[1].varied == {"scale": 0.5}


def test_checkpoints_are_an_axis(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for step in (50, 100):
        (tmp_path / "checkpoints" / f"step_{step:06d}.ckpt").touch()
    run = Subject("run", "r", adapters=MINE.adapters, run=tmp_path, num_steps=100)
    found = grid(Axes(step="all"), compete=["step"], subjects=[BASE, run], prompts=["a"], seeds=[0])
    assert [(c.variant, c.step) for c in found] == [("base", FINAL), ("run step 50", 50), ("run step 100", FINAL)]
    with pytest.raises(UserError, match=r"axes\.step=70: no subject has a checkpoint of that step.*\[50, 100\]"):
        grid(Axes(step=[70]), subjects=[run])
    with pytest.raises(UserError, match=r"axes\.step: none of the subjects is a run with checkpoints"):
        grid(Axes(step="all"))


def test_wrong_axes_are_named() -> None:
    with pytest.raises(UserError, match=r"axes\.cfg is empty"):
        Axes(cfg=[])
    with pytest.raises(UserError, match=r"compete=\['cfg'\]: axes\.cfg has fewer than two values"):
        grid(Axes(), compete=["cfg"])


def test_prompts_come_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# mine\nкот на крыше 🐈\n\n a <b>dog</b> \nкот на крыше 🐈\n", encoding="utf-8")
    assert read_prompts(str(file)) == ["кот на крыше 🐈", "a <b>dog</b>"]
    file.write_text("# nothing\n\n")
    with pytest.raises(UserError, match=r"prompts=.*: holds no prompt"):
        read_prompts(str(file))
    with pytest.raises(UserError, match=r"prompts=nowhere\.txt: cannot be read"):
        read_prompts("nowhere.txt")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is not UTF-8"):
        read_prompts(str(file))
