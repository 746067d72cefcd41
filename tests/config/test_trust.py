"""A config from a file runs nothing: attacks through every file that people pass to each other."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

import sdft
import sdft.training.__main__ as train
from sdft.config.command import CONF_DIR, compose
from sdft.config.compose import composer
from sdft.config.keys import ConfigError
from sdft.config.trust import (
    line_of_key,
    read_config,
    read_yaml,
    refuse_untrusted,
    refuse_untrusted_overrides,
    trusted_by,
)
from sdft.errors import UserError
from sdft.evaluation.run import config_of, rebuild
from sdft.merging.run import read_recipe

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_of_version_0_1"
MARK = "the_attack_ran"

TARGETS = [
    "os.system",
    "subprocess.run",
    "builtins.eval",
    "builtins.exec",
    "builtins.open",
    "pathlib.Path.write_text",
    "shutil.rmtree",
    "torch.load",
    "numpy.load",
    "pickle.load",
    "hydra.utils.instantiate",
    "hydra.utils.get_class",
    "importlib.import_module",
    "webbrowser.open",
    "my_lab.Loss",
    "sdft.training.receipt.subprocess.run",
    "sdft.config.check.importlib.import_module",
    "sdft.formats.training_checkpoint.remove_state",
    "torch.optim.optimizer.torch.load",
    "torch.optim.Optimizer.__init__",
    "diffusers.DiffusionPipeline.from_pretrained",
    3,
    None,
]
"""What is importable, and no class that a config of sdft names."""
VALUES = {
    "data.shards": "pipe:touch the_attack_ran",
    "data.train.shards": "a.tar::pipe:touch the_attack_ran",
    "model.weights": "${oc.env:HOME}",
    "name": "${oc.env:SECRET,x}",
    "style": "${oc.decode:'1'}",
    "caption": "${${oc.env:X}}",
    "prompts": ["${hydra:job.name}"],
    "model.allow_pickle": True,
    "sampler.name": "os.system",
    "other": {"with.dots": [{"_target_": "sdft.sampling.Sampler", "name": "os.system"}]},
    "words": {"_target_": "hydra.utils.get_object", "path": "os.system"},
    "verdict.sampler.name": "subprocess.run",
}


def at(key: str, value: object) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[return-value]


def run_with(folder: Path, content: dict) -> Path:
    """An old run whose config was changed."""
    shutil.copytree(OLD_RUN, folder)
    config = folder / ".hydra" / "config.yaml"
    tree = yaml.safe_load(config.read_text())
    for key, value in content.items():
        tree[key] = {**tree[key], **value} if isinstance(tree.get(key), dict) and isinstance(value, dict) else value
    config.write_text(yaml.safe_dump(tree))
    return folder


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("part", ["model", "objective", "tuning", "callbacks"])
def test_a_run_folder_names_only_what_sdft_has(part: str, target: object, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    node = {"_target_": target, "_args_": [f"touch {MARK}"]}
    run = run_with(tmp_path / "run", {part: {"x": node} if part == "callbacks" else node})
    with pytest.raises(ConfigError, match=r"config\.yaml, line \d+: .*_target_=.* is not part of sdft.* trust="):
        rebuild(run)
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("key", VALUES)
def test_a_run_folder_runs_no_command_and_reads_no_environment(key: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_with(tmp_path / "run", at(key, VALUES[key]))
    with pytest.raises(ConfigError, match=r"\.hydra/config\.yaml, line \d+: .*trust="):
        rebuild(run)
    assert not (tmp_path / MARK).exists()


def as_written(overrides: list[str]) -> DictConfig:
    """The config that Hydra writes beside a run: nothing is resolved."""
    with composer("train", CONF_DIR, overrides) as opened:
        cfg, _ = opened.load(overrides)
    return OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))


@pytest.mark.parametrize("experiment", ["word", "product", "character"])
def test_configs_that_compute_values_are_opened(experiment: str, tmp_path: Path) -> None:
    """As Hydra writes them, with interpolations that are nested or make a dict, and no others."""
    cfg = as_written([f"experiment={experiment}"])
    folder = tmp_path / ".hydra"
    folder.mkdir()
    OmegaConf.save(cfg, folder / "config.yaml")
    assert "oc.create" in (folder / "config.yaml").read_text()
    begins_as = {"word": "blue light at night", "product": "car", "character": "robot"}[experiment]
    assert config_of(tmp_path).tuning.new_words == {"zorbix": begins_as}
    for value in (
        "${oc.create:'{a: ${oc.env:HOME}}'}",
        "${oc.create:'{${word}: ${initial_phrase} }'}",
        "${known.${oc.env:HOME}}",
    ):
        OmegaConf.update(cfg, "tuning.new_words", value)
        OmegaConf.save(cfg, folder / "config.yaml")
        with pytest.raises(ConfigError, match=r"tuning\.new_words=.*trust=commands"):
            config_of(tmp_path)


@pytest.mark.parametrize(
    "value", ["$", "{oc.env:HOME}", "a: ${oc.env:HOME}", "x}: ${oc.env:HOME}, {y", "\\${oc.env:HOME}"]
)
@pytest.mark.parametrize("key", ["word", "initial_phrase"])
def test_no_interpolation_can_be_put_together(key: str, value: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "a secret")
    cfg = as_written(["experiment=word"])
    OmegaConf.update(cfg, key, value)
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(cfg, tmp_path / ".hydra" / "config.yaml")
    try:
        found = str(config_of(tmp_path))
    except UserError as error:
        found = str(error)
    assert "a secret" not in found


@pytest.mark.parametrize(
    "override",
    [
        *(f"optimizer._target_={target}" for target in TARGETS[:6]),
        "+callbacks.x={_target_: os.system, command: touch the_attack_ran}",
        "++model._target_=torch.load",
        *(f"{key}='{value}'" for key, value in VALUES.items() if isinstance(value, str)),
        "+words={_target_: hydra.utils.get_object, path: os.system}",
        "hydra.searchpath=[file:///tmp]",
        "hydra/launcher=slurm",
        "+hydra.callbacks.x._target_=os.system",
        "model.allow_pickle=true",
        "not an override",
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_receipt_runs_nothing(override: str, dry_run: bool, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    record = {"overrides": ["experiment=dreamy_style", override], "outputs": {}}
    (tmp_path / "receipt.json").write_text(json.dumps(record))
    monkeypatch.setattr(sys, "argv", ["train.py", "reproduce=receipt.json", f"dry_run={str(dry_run).lower()}"])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: reproduce: receipt.json, line 1")
    assert [file.name for file in tmp_path.iterdir()] == ["receipt.json"]


def test_a_receipt_from_python_runs_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = {"name": "x", "run_dir": "runs/x", "model": {"_target_": "os.system", "command": f"touch {MARK}"}}
    record = {"git": {}, "versions": {}, "hardware": {}, "outputs": {}, "figures": {}, "threads": 2, "data": "x"}
    (tmp_path / "receipt.json").write_text(json.dumps({"overrides": None, "config": config, **record}))
    with pytest.raises(UserError, match=r"model\._target_=os\.system is not part of sdft"):
        sdft.finetune(["reproduce=receipt.json"])
    assert not (tmp_path / MARK).exists()


def test_loading_a_run_folder_reads_no_environment(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SECRET", "nano")
    run = run_with(tmp_path / "run", at("model.weights", "${oc.env:SECRET}"))
    with pytest.raises(UserError, match=r"model\.weights=.*not allowed"):
        sdft.load_model(run)


@pytest.mark.parametrize(
    "steps",
    [
        "{m: {method: os.system, command: touch the_attack_ran}}",
        "{m: {method: my_lab.larger, a: nano, b: nano}}",
        '{m: {method: weighted_sum, a: "${oc.env:HOME}", b: nano}}',
        "{m: {method: sdft.training.receipt.subprocess.run, a: nano, b: nano}}",
    ],
)
def test_a_recipe_runs_nothing(steps: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"steps: {steps}")
    with pytest.raises(UserError, match="trust="):
        read_recipe(recipe, {})
    assert not (tmp_path / MARK).exists()


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: !!python/object/apply:os.system [ls]", "the tag .* is not allowed"),
        ("a: !!python/name:os.system", "the tag .* is not allowed"),
        ("a: !Loss {x: 1}", "the tag !Loss in line 1 is not allowed"),
        ("a: !!binary aGVsbG8=", "the tag .* is not allowed"),
        (BOMB, "aliases that expand to more than"),
        ("a: &a [*a]", "aliases that expand to more than"),
        ("a: &a {b: *a}", "aliases that expand to more than"),
        ("[" * 5000, "cannot be read"),
        ("a: [", "cannot be read"),
        ("\x00", "cannot be read"),
    ],
)
def test_yaml_that_is_more_than_data_is_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(content)
    for read in (read_yaml, read_config, lambda path: read_recipe(path, {})):
        with pytest.raises(UserError, match=message):
            read(file)


def test_what_sdft_writes_is_trusted(tmp_path: Path) -> None:
    assert rebuild(run_with(tmp_path / "run", {})) is not None
    for name in ("torch.optim.SGD", "sdft.optimizers.optimizers.adamw", "sdft.optimizer.adamw"):
        refuse_untrusted({"optimizer": {"_target_": name}, "run_dir": "runs/${name}/${now:%Y-%m-%d}"}, "here")
    refuse_untrusted({"sampler": {"name": "diffusers.PNDMScheduler"}}, "here")


CHOICES = [
    *([f"experiment={name}"] for name in ("dreamy_style", "photo_style", "technomant", "nano_base", "nano_clip")),
    ["data=folder", "data.root=x", "data.tags.shuffle=true"],
    ["data=webdataset", "data.shards='a/{000..123}.tar'"],
    ["data=huggingface", "data.name=x/y"],
    ["data=mix", "data.train.sources.own.root=x", "data.train.sources.others.root=y"],
    ["model=sdxl", "tuning=lora_unet_te", "tuning.new_words={zorbix: neon drawing}"],
    ["callbacks=importance", "strategy=fsdp", "logger=wandb", "objective=v_zero_snr", "objective/weighting=debiased"],
    ["sampler=dpmpp_2m_sde_karras", "objective/timesteps=logit_normal", "lr_schedule=constant"],
    *([f"optimizer={file.stem}"] for file in sorted((CONF_DIR / "optimizer").glob("*.yaml"))),
]


@pytest.mark.parametrize("overrides", CHOICES, ids=" ".join)
def test_every_option_of_sdft_is_trusted(overrides: list[str]) -> None:
    cfg = compose("train", overrides)
    refuse_untrusted(OmegaConf.to_container(cfg, resolve=False), "here")
    refuse_untrusted_overrides(overrides, Path("here"))


def test_the_command_line_says_whom_to_trust() -> None:
    assert trusted_by(["rank=4", "trust=my_lab"]) == ["my_lab"]
    assert trusted_by(["trust=[my_lab,commands]"]) == ["my_lab", "commands"]
    node = {"optimizer": {"_target_": "my_lab.training.Lion"}, "data": {"shards": "pipe:cat x.tar"}}
    with pytest.raises(ConfigError, match=r"data.shards runs a command .*trust=commands"):
        refuse_untrusted(node, "here", ["my_lab"])
    with pytest.raises(ConfigError, match="add trust=my_lab"):
        refuse_untrusted(node, "here", ["commands"])
    with pytest.raises(ConfigError, match="add trust=my_lab"):
        refuse_untrusted(node, "here", ["my_labs", "commands"])
    refuse_untrusted(node, "here", ["my_lab", "commands"])


def test_a_dry_run_runs_no_command_of_the_command_line_either(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["data=webdataset", f"data.shards='pipe:touch {MARK}'", "data.cache_dir=cache", "dry_run=true"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit):
        train.main()
    assert "dry_run=true runs no commands" in capsys.readouterr().err
    assert not (tmp_path / MARK).exists()


def test_a_refusal_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("# a comment\nmodel:\n  a: 1\n  parts:\n    - b: 2\n    - _target_: os.system\n      c.d: {e: 1}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml, line 6: model\.parts\.1\._target_=os\.system is not part"):
        read_config(file)
    lines = {"model": 2, "model.parts.1.c.d.e": 7, "model.parts.0.b": 5, "nowhere": None, "model.a.x": 3}
    assert {key: line_of_key(file, key) for key in lines} == lines
    receipt = tmp_path / "receipt.json"
    receipt.write_text(json.dumps({"overrides": ["rank=4", "+x={_target_: os.system}"]}, indent=2))
    with pytest.raises(ConfigError, match=r"reproduce: .*receipt\.json, line 4: x\._target_=os\.system"):
        refuse_untrusted_overrides(["rank=4", "+x={_target_: os.system}"], receipt)
