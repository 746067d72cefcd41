"""Every YAML in `conf/` composes and binds to the constructors it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdft.config.command import CONF_DIR, ConfigError, build, check, compose
from sdft.errors import UserError
from sdft.planning.dry_run import forecast
from sdft.tuning.words import Words

DATA = ("toy", "check", "cache", "shard", "caption", "edit", "tags", "mask")
COMMANDS = ("train", "eval", "merge", "strip", "formats", "choose", "publish", "nano", "board")
ROOTS = {*COMMANDS, *(f"data_{command}" for command in DATA)}
NEEDS = {
    "segmenter/text": ["segmenter.text=cat"],
    "class_images/generated": ["class_images.prompt=a photo of a mug"],
    "data/folder": ["data.root=somewhere"],
    "data/webdataset": ["data.shards=somewhere"],
    "data/huggingface": ["data.name=someone/some"],
    "data/preference": ["data.root=somewhere"],
    "data/votes": ["data.votes=somewhere"],
    "data/mix": ["data.train.sources.own.root=here", "data.train.sources.others.root=there"],
    "model/nano_vae": ["tuning=full", "objective=reconstruction", "verdict=autoencoder"],
    "model/nano_clip": ["tuning=full", "objective=contrastive", "verdict=judge"],
    "model/nano_untrained": ["tuning=full"],
    "recipe/nano_vae_full": ["experiment=nano_vae"],
    "recipe/nano_clip_full": ["experiment=nano_clip"],
    "recipe/nano_untrained_full": ["experiment=nano_base"],
    "objective/weighting/debiased": ["objective=epsilon"],
    "tuning/words": ["tuning.new_words={zorbix: cat}"],
    "recipe/nano_words": ["model=nano", "tuning=words", "tuning.new_words={zorbix: cat}"],
    "recipe/sdxl_words": ["model=sdxl", "tuning=words", "tuning.new_words={zorbix: cat}"],
    "objective/prior/prediction": ["objective.prior.caption=cat"],
}
MERGE_NEEDS = {
    "linear": ["models=[x]"],
    "fisher": ["models=[x]", "importances=[y]"],
    "geometric_median": ["models=[x]"],
    "add_difference": ["a=x", "b=x", "c=x"],
    "train_difference": ["a=x", "b=x", "c=x"],
    "cosine_adaptive": ["base=x", "a=x", "b=x"],
    **{name: ["base=x", "models=[x]"] for name in ("model_stock", "ties", "dare", "dare_ties", "della")},
    "bake": ["base=x", "lora=x"],
    "lora_sum": ["loras=[x]"],
    "resize": ["lora=x"],
    "recipe": ["file=x"],
}
"""The inputs of each method; a and b where not said."""
ROOT_NEEDS = {
    "merge": ["a=x", "b=y", "out=z"],
    "strip": ["a=x", "b=y"],
    "formats": ["in=x", "out=y", "to=folder"],
    "data_toy": ["out=x"],
    "data_check": ["data.root=x"],
    "data_cache": ["data.root=x", "out=y"],
    "data_shard": ["root=x", "out=y"],
    **{f"data_{command}": ["root=x"] for command in ("caption", "edit", "tags", "mask")},
    "eval": ["subjects={base: nano}"],
    "choose": ["run=x"],
    "board": ["in=x"],
    "publish": ["run=x"],
}


def options() -> list[str]:
    """Every option of every group, as `group/option`; names that start with _ are parts of others."""
    files = sorted(CONF_DIR.rglob("*.yaml"))
    named = [file.relative_to(CONF_DIR).with_suffix("").as_posix() for file in files]
    return [name for name in named if "/" in name and not Path(name).name.startswith("_")]


@pytest.mark.parametrize("option", options())
def test_every_option_composes_and_binds(option: str) -> None:
    group, _, name = option.rpartition("/")
    if group == "merge":
        check(compose("merge", [f"merge={name}", "out=x", *MERGE_NEEDS.get(name, ["a=x", "b=x"])]))
        return
    if group in ("captioner", "segmenter"):
        root = {"captioner": "data_caption", "segmenter": "data_mask"}[group]
        check(compose(root, [f"{group}={name}", *ROOT_NEEDS[root], *NEEDS.get(option, [])]))
        return
    if group in ("eval", "metrics"):
        check(compose("eval", [f"{group}={name}", *ROOT_NEEDS["eval"]]))
        return
    words = NEEDS.get(option, [])
    if group == "recipe":
        model, tuning = name.split("_", 1)
        words = words or [f"model={model}", f"tuning={tuning}"]
    else:
        words = [*words, f"{group}={name}"]
    if name.startswith("eval_"):
        check(compose("eval", [f"model={tuning}", *ROOT_NEEDS["eval"]]))
    else:
        check(compose("train", words))


@pytest.mark.parametrize("word", ["sampler=lcm", "logger=wandb", "model=sdxl", "metrics=[default,loss]"])
def test_a_comparison_takes_groups_of_training(word: str) -> None:
    check(compose("eval", [word, *ROOT_NEEDS["eval"]]))


@pytest.mark.parametrize("root", sorted(ROOTS))
def test_every_root_composes_and_binds(root: str) -> None:
    check(compose(root, ROOT_NEEDS.get(root, [])))


def test_no_root_is_forgotten() -> None:
    assert {file.stem for file in CONF_DIR.glob("*.yaml")} == ROOTS


@pytest.mark.parametrize("file", sorted((CONF_DIR / "experiment").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_first_comment_of_an_experiment_is_its_command(file: Path) -> None:
    comments = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    assert f"python train.py experiment={file.stem}" in comments[1]


TASKS = ("style", "word", "product", "character", "brand")


@pytest.mark.parametrize("experiment", ["dreamy_style", "photo_style", "technomant", *TASKS])
def test_an_experiment_runs_on_the_real_model_and_own_pictures_by_name_alone(experiment: str) -> None:
    """The sizes, steps and rates of `model=sdxl` come with it, and nothing of the toy world stays."""
    cfg = compose("train", [f"experiment={experiment}", "model=sdxl", "data=folder", "data.root=somewhere"])
    check(cfg)
    assert cfg.size == cfg.data.size == cfg.verdict.size == 1024
    assert cfg.optimizer.lr <= 1e-4
    assert "train" not in cfg.data


@pytest.mark.parametrize("more", [[], ["model=sdxl", "data=folder", "data.root=somewhere"]], ids=["nano", "sdxl"])
def test_a_word_is_learned_by_its_embedding_alone_by_name(more: list[str]) -> None:
    cfg = compose("train", ["experiment=word", "tuning=words", *more])
    check(cfg)
    assert isinstance(build(cfg.tuning), Words)


def test_a_part_gets_a_schedule_beside_that_of_the_run() -> None:
    """A group that is added at another package is not the file of the root, which declares its own keys."""
    added = "+lr_schedule@part_schedules.words=constant"
    cfg = compose("train", ["experiment=technomant", added, "part_schedules.words.warmup_steps=3"])
    check(cfg)
    assert cfg.lr_schedule._target_.endswith("cosine")
    assert cfg.part_schedules.words == {
        "_target_": "sdft.optimizers.schedules.constant", "_partial_": True, "warmup_steps": 3
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"unknown key 'part_schedules.words.warmup'"):
        check(compose("train", ["experiment=technomant", added, "part_schedules.words.warmup=3"]))


def test_a_schedule_of_a_part_that_is_not_trained_is_refused_before_the_run(tmp_path: Path) -> None:
    overrides = ["experiment=dreamy_style", "+lr_schedule@part_schedules.words=constant", "dry_run=true"]
    cfg = compose("train", [*overrides, f"run_dir={tmp_path}"])
    with pytest.raises(UserError, match="part_schedules names words; the trained parts are unet"):
        forecast(cfg)
