"""docs/extending.md is right: its files make a package outside the repository, its commands compose, check and run."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from page_commands import PICTURES, write_pictures
from safetensors.torch import load_file
from warm import WarmPython

from sdft.config.command import check, compose
from sdft.config.keys import ConfigError

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'```\w+ title="(my_lab/[^"]+)"\n(.*?)```', PAGE, re.DOTALL))
COMMANDS = [
    command for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for command in block.strip().splitlines()
]
ROOTS = {"train.py": "train", "eval.py": "eval", "sdft.merging": "merge"}
ROOTS |= {name: f"data_{name}" for name in ("caption", "mask")}
SHORT = {
    "train": ["trainer.max_steps=2", "verdict=none", "~callbacks.previews", "logger=csv", "+export.tolerance=1"],
    "eval": ["sampler.steps=6", "sampler.batch_size=2", "prompts=[a cat]"],
    "merge": [],
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that contains `my_lab`, importable in this process."""
    folder = tmp_path_factory.mktemp("outside")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    for package in ("my_lab", "my_lab/conf"):
        (folder / package / "__init__.py").touch()
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for module in [name for name in sys.modules if name.split(".")[0] == "my_lab"]:
        del sys.modules[module]


def split(command: str) -> tuple[list[str], str, list[str]]:
    """How Python is called, the root of the configs, and the overrides."""
    words = shlex.split(command)
    assert words[0] == "python"
    num = {"train.py": 1, "eval.py": 1}.get(words[1], 3 if words[2] == "sdft.data" else 2)
    program, rest = words[1 : 1 + num], words[1 + num :]
    overrides = [word for word in rest if word not in ("-m", "--config-dir", "my_lab/conf")]
    return program, ROOTS[program[-1]], overrides


def test_the_page_shows_every_extension() -> None:
    groups = {name.split("/")[2] for name in FILES if name.startswith("my_lab/conf/")}
    expected = {"optimizer", "objective", "callbacks", "captioner", "data", "sampler", "segmenter", "metrics", "merge"}
    assert groups == {*expected, "model"}
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", [c for c in COMMANDS if " -m --config-dir" not in c])
def test_a_command_composes_and_fits_its_classes(command: str, lab: Path) -> None:
    _, root, overrides = split(command)
    check(compose(root, overrides, config_dirs=[lab / "my_lab" / "conf"]))


@pytest.mark.parametrize(
    "searchpath", ["file://{lab}/my_lab/conf", "pkg://my_lab.conf"], ids=["a folder", "a package"]
)
def test_the_search_path_of_hydra_adds_the_same_options(searchpath: str, lab: Path) -> None:
    path = searchpath.format(lab=lab)
    cfg = compose("train", [f"hydra.searchpath=[{path}]", "experiment=dreamy_style", "optimizer=radam"])
    assert cfg.optimizer._target_ == "torch.optim.RAdam"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer=radm"], "'optimizer' has no option 'radm'; did you mean 'radam'?"),
        (["optimizer=radam", "optimizer.betaz=0.5"], "did you mean 'optimizer.betas'?"),
        (["objective/weighting=truncated_snr", "objective.weighting.gama=3"], "mean 'objective.weighting.gamma'?"),
        (["objective/weighting=truncated_snr", "objective.weighting.gamma=much"], "objective.weighting.gamma=much"),
        (["callbacks=with_norm", "callbacks.norm.evry=3"], "did you mean 'callbacks.norm.every'?"),
        (["+callbacks.n={_target_: my_lab.callbacks.WeightNorn}"], "WeightNorn' does not exist; did you mean"),
        (["+callbacks.n={_target_: my_lab.callbacks.WeightNorm,evry: 3}"], "did you mean 'callbacks.n.every'?"),
        (["data=squares", "data.train.numb=3"], "did you mean 'data.train.num'?"),
        (["data=squares", "data.train.num=three"], "data.train.num=three"),
    ],
)
def test_a_typo_is_reported_with_a_suggestion(overrides: list[str], message: str, lab: Path) -> None:
    with pytest.raises(ConfigError) as found:
        check(compose("train", ["experiment=dreamy_style", *overrides], config_dirs=[lab / "my_lab" / "conf"]))
    assert message in str(found.value)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("pkg://my_lob.conf", "Python cannot import 'my_lob.conf'"),
        ("file:///no/such/folder", "there is no config directory /no/such/folder"),
        ("ftp://somewhere", "must begin with file:// or pkg://"),
    ],
)
def test_a_place_that_does_not_exist_is_named(place: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose("train", [f"hydra.searchpath=[{place}]"])


@pytest.mark.slow
def test_every_command_runs(lab: Path) -> None:
    for name in ("train.py", "eval.py"):
        (lab / name).symlink_to(ROOT / name)
    write_pictures(lab / "pictures")
    for caption in (lab / "pictures").glob("*.txt"):
        caption.unlink()
    with WarmPython(PYTHONPATH=f"{lab}:{ROOT}") as python:
        for number, command in enumerate(COMMANDS):
            program, root, _ = split(command)
            words = [word.replace("DIR", "pictures") for word in shlex.split(command)[1 + len(program) :]]
            if root in ("train", "eval"):
                words += SHORT[root] + ([f"run_dir=runs/{number}"] if "-m" not in words else [])
            status, printed = python.run([*program, *words], lab)
            assert status == 0, f"{command}\n{printed[-4000:]}"
    told = {file.read_text() for file in (lab / "pictures").glob("*.txt")}
    assert told <= {"a bright picture\n", "a dark picture\n"}
    assert len(list((lab / "pictures").glob("*.txt"))) == len(list((lab / "pictures").glob("*.mask.png"))) == PICTURES
    table = next((lab / "multirun").rglob("table.txt")).read_text()
    assert len(table.splitlines()) == 6  # a heading, four jobs, and by what they are ranked without a style gain
    for job in (lab / "multirun").rglob("lora.safetensors"):
        assert job.stat().st_size > 0


@pytest.mark.slow
def test_a_run_with_parts_from_outside_is_resumed(lab: Path) -> None:
    words = ["train.py", "hydra.searchpath=[pkg://my_lab.conf]", "experiment=dreamy_style", "optimizer=radam",
             "data=squares", "objective/weighting=truncated_snr", "callbacks=with_norm", "verdict=none",
             "~callbacks.previews",
             "logger=csv", "+export.tolerance=1", "trainer.log_every=1"]  # fmt: skip
    if not (lab / "train.py").exists():
        (lab / "train.py").symlink_to(ROOT / "train.py")
    with WarmPython(PYTHONPATH=f"{lab}:{ROOT}") as python:
        for steps, name in ((2, "resumed"), (4, "resumed"), (4, "straight")):
            words_of_run = [*words, f"trainer.max_steps={steps}", "resume=auto", f"run_dir=runs/{name}"]
            status, printed = python.run(words_of_run, lab)
            assert status == 0, printed[-4000:]
    resumed, straight = (lab / "runs" / name for name in ("resumed", "straight"))
    assert "train/weight_norm" in (resumed / "metrics.csv").read_text().splitlines()[0]
    first, second = (load_file(run / "lora_kohya.safetensors") for run in (resumed, straight))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
