"""Law 5, strict config: every way to be wrong gets one sentence, before anything runs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from warm import WarmPython

from sdft.config.command import ConfigError, check, compose
from sdft.config.compose import Composer
from sdft.errors import UserError

PARTS = """
from __future__ import annotations
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal
from annotated_types import Ge, Gt
if TYPE_CHECKING:
    from nowhere import Ghost

@dataclass
class Size:
    h: int = 1

class Model:
    def __init__(self, width: Annotated[int, Ge(1)] = 8, path: Path | None = None): ...

class Objective:
    def __init__(self, prediction: Literal["epsilon", "v_prediction"], weighting: Callable = abs): ...

def adamw(params, lr: Annotated[float, Gt(0)], betas: tuple[float, float] = (0.9, 0.99), fused: bool | None = None): ...
def sgd(params, lr: float, momentum: float = 0.0): ...
def snr(gamma: float = 5.0): ...
def folder(path: Path, root: Path): ...
def tuning(rank: int | None = None, blocks: dict[str, Annotated[int, Gt(0)]] | None = None): ...
def anything(ghost: Ghost = None, number: int = 1, sizes: Sequence[int] | Literal["auto"] = "auto",
             size: Size = Size(), model: Model | None = None, loose: int = None, **rest): ...
def ours(number: int, **rest): ...
ours.__module__ = "sdft.pretend"

@functools.wraps(snr)
def wrapped(*args, **kwargs): ...
broken = 3
"""
CONF = {
    "train": """
        defaults:
          - model: nano
          - data: toy
          - tuning: full
          - objective: denoising
          - optimizer: adamw
          - optional recipe: ${model}_${tuning}
          - experiment: null
          - _self_
        seed: 0
        name: run_${seed}
        callbacks: {}
        logs:
          first: {_target_: parts.Model, width: 4}
        tags: {}
        """,
    "eval": "defaults: [{data: '???'}, _self_]\nseed: 0",
    "experiment/dreamy_style": """
        # @package _global_
        defaults: [{override /tuning: lora_unet}, {override /data: folder}]
        data: {root: here}
        rank: 4
        """,
    "experiment/misspelt": "# @package _global_\nsede: 3",
    "model/nano": "_target_: parts.Model\nwidth: 8",
    "model/sdxl": "_target_: parts.Model\nwidth: 320\npath: weights",
    "data/toy": "_target_: parts.Model",
    "data/folder": "_target_: parts.folder\npath: ${.root}\nroot: ???",
    "tuning/full": "_target_: parts.tuning",
    "tuning/lora_unet": """
        # @package _global_
        tuning: {_target_: parts.tuning, rank: '${rank}'}
        rank: 8
        """,
    "tuning/lora_te": "defaults: [lora_unet]",
    "objective/denoising": "defaults: [{weighting: snr}]\n_target_: parts.Objective\nprediction: epsilon",
    "objective/flow": "_target_: parts.Objective\nprediction: epsilon",
    "objective/weighting/snr": "_target_: parts.snr\n_partial_: true\ngamma: 5",
    "objective/weighting/flat": "_target_: parts.snr\n_partial_: true",
    "optimizer/adamw": "_target_: parts.adamw\n_partial_: true\nlr: 1e-4\nbetas: [0.9, 0.99]",
    "optimizer/sgd": "_target_: parts.sgd\n_partial_: true\nlr: 1e-2\nmomentum: 0.9",
    "recipe/nano_full": "# @package _global_\noptimizer: {lr: 0.5}",
    "merge/average": "weight: 1",
}


@pytest.fixture(autouse=True)
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in CONF.items():
        file = tmp_path / "conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [line for line in text.splitlines() if line.strip()]
        indent = min(len(line) - len(line.lstrip()) for line in lines)
        file.write_text("\n".join(line[indent:] for line in lines))
    (tmp_path / "parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("parts", None)
    return tmp_path / "conf"


def refusal(conf: Path, *words: str, root: str = "train") -> str:
    with pytest.raises(ConfigError) as caught:
        check(compose(root, words, conf))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model=sdxl", "optimizer.lr=1e-3", "seed=4", "name='x y'"],
        ["tuning=lora_unet", "rank=16"],
        ["tuning=lora_te", "rank=16"],
        ["experiment=dreamy_style", "rank=32"],
        ["experiment=dreamy_style", "data.root=there"],
        ["objective/weighting=flat", "objective.weighting={_target_:parts.snr}"],
        ["+callbacks.ema={_target_:parts.snr,gamma:2}", "+tags.free=anything"],
        ["+optimizer.fused=true", "optimizer.betas=[0.5,0.5]"],
        ["hydra.run.dir=elsewhere", "hydra/job_logging=none", "+hydra.job.env_set.A=b"],
        ["++seed=4", "~optimizer.betas", "~experiment"],
        ["logs.first.width=3"],
        ["objective.weighting={gamma:2}"],
    ],
)
def test_right_commands_pass(conf: Path, words: list[str]) -> None:
    check(compose("train", words, conf))


def test_compose_gives_the_values_without_hydra(conf: Path) -> None:
    cfg = compose("train", ["seed=7", "experiment=dreamy_style"], conf)
    assert (cfg.name, cfg.rank, cfg.tuning.rank, cfg.data.path) == ("run_7", 4, 4, "here")
    assert "hydra" not in cfg


@pytest.mark.parametrize("words", [["tags={a: 1, b: {c: x}}"], ["model=sdxl", "tags={a: 1, b: {c: x}}"]])
def test_a_dict_that_is_declared_empty_is_filled(conf: Path, words: list[str]) -> None:
    assert compose("train", words, conf).tags == {"a": 1, "b": {"c": "x"}}


def test_a_dict_that_is_declared_empty_is_filled_entry_by_entry(conf: Path) -> None:
    assert compose("train", ["tags.a=1", "tags.b.c=x"], conf).tags == {"a": 1, "b": {"c": "x"}}


def test_an_entry_adds_to_those_of_an_experiment(conf: Path) -> None:
    (conf / "experiment/tagged.yaml").write_text("# @package _global_\ntags: {theirs: 1}")
    assert compose("train", ["experiment=tagged", "tags.mine=2"], conf).tags == {"theirs": 1, "mine": 2}


def test_a_dict_that_an_experiment_has_filled_is_not_replaced(conf: Path) -> None:
    (conf / "experiment/tagged.yaml").write_text("# @package _global_\ntags: {theirs: 1}")
    message = "tags has entries already (theirs, from experiment/tagged.yaml): ++tags=... adds to them"
    assert refusal(conf, "experiment=tagged", "tags={mine: 2}") == message
    assert compose("train", ["experiment=tagged", "++tags={mine: 2}"], conf).tags == {"theirs": 1, "mine": 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["modle=nano"], "unknown key 'modle'; did you mean 'model'?"),
        (
            ["experiment=dremy_style"],
            "'experiment' has no option 'dremy_style'; did you mean 'dreamy_style'? Options: dreamy_style, misspelt",
        ),
        (["model=3"], "'model' has no option '3'. Options: nano, sdxl"),
        (["model=null"], "'model' has no option null; '~model' leaves it out"),
        (["hydra/launcher=elsewhere"], "'hydra/launcher' has no option 'elsewhere'. Options: basic"),
        (["optimizer.lrr=1"], "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        (["lr=1"], "unknown key 'lr'; did you mean 'optimizer.lr'?"),
        (["weighting=flat"], "unknown key 'weighting'; did you mean 'objective/weighting'?"),
        (["gama=1"], "unknown key 'gama'; did you mean 'objective.weighting.gamma'?"),
        (["zzz=1"], "unknown key 'zzz'. Known at the top: "),
        (["seed.x=1"], "unknown key 'seed.x'"),
        (["objective.zzz=1"], "unknown key 'objective.zzz'. Known in 'objective': weighting, prediction"),
        (["optimizer={lrr:1}"], "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        (["+merge=average"], "merge/average.yaml sets 'merge': unknown key 'merge'"),
        (["hydra.run.dirr=x"], "unknown key 'hydra.run.dirr'"),
        (["~nothing"], "unknown key 'nothing'"),
        (["=3"], "'=3' is not an override"),
        (["seed='a"], "cannot read 'seed='a': it holds a character that needs quotes"),
        (["+new.key=1"], "unknown key 'new'"),
        (["+seeed=1"], "unknown key 'seeed'; did you mean 'seed'?"),
        (["++seeed=1"], "unknown key 'seeed'; did you mean 'seed'?"),
        (["merge=average"], "'merge' is not part of 'train'. Its groups: data, experiment, model, "),
        (["objective=flow", "objective/weighting=flat"], "'objective/weighting' means nothing with objective=flow;"),
        (
            ["rank=8", "tuning=full"],
            "'rank' means nothing with tuning=full; tuning=lora_te and tuning=lora_unet have it",
        ),
        (
            ["experiment=dreamy_style", "tuning=full"],
            "experiment/dreamy_style.yaml sets 'rank': 'rank' means nothing with tuning=full; tuning=lora_te and",
        ),
        (["optimizer.momentum=0"], "'optimizer.momentum' means nothing with optimizer=adamw; optimizer=sgd has it"),
        (["experiment=misspelt"], "experiment/misspelt.yaml sets 'sede': unknown key 'sede'; did you mean 'seed'?"),
        (["objective.weighting=flat"], "'objective.weighting' is a group; did you mean 'objective/weighting=flat'?"),
        (["optimizer.betas=[0.9"], "cannot read 'optimizer.betas=[0.9': "),
        (["dreamy_style"], "'dreamy_style' is not an override; did you mean 'experiment=dreamy_style'?"),
        (["model"], "'model' is not an override: write model=<option>. Options: nano, sdxl"),
        (["tuning=lora_unet", "rank=4,8"], "rank=4,8 is a sweep: add -m to sweep (or write rank=[4,8] for a list)"),
        (["seed=range(3)"], "seed=range(3) is a sweep: add -m to sweep"),
        (["data=folder"], "data.root is not set: pass data.root=..."),
        (["name=${sead}"], "name: ${sead} points to 'sead', which does not exist; did you mean 'seed'?"),
        (["name=${oc.env:SDFT_NOT_THERE}"], "name: ${oc.env:SDFT_NOT_THERE} cannot be resolved: Environment variable"),
        (["name=${name}"], "name: ${name} "),
    ],
)
def test_wrong_commands_are_explained(conf: Path, words: list[str], message: str) -> None:
    assert message in refusal(conf, *words)


def test_roots_and_mandatory_groups(conf: Path) -> None:
    assert refusal(conf, root="eval") == "data is not chosen: pass data=... Options: folder, toy"
    assert "there is no tain.yaml in" in (message := refusal(conf, root="tain"))
    assert "did you mean 'train'?" in message
    assert "there is no config directory" in refusal(conf / "nowhere")


def test_a_recipe_nobody_wrote(conf: Path) -> None:
    file = conf / "train.yaml"
    file.write_text(file.read_text().replace("optional recipe", "recipe"))
    assert "'recipe' has no option 'sdxl_full', which this combination asks for" in refusal(conf, "model=sdxl")


def test_yaml_that_does_not_parse(conf: Path) -> None:
    (conf / "model/nano.yaml").write_text("_target_: [parts")
    message = refusal(conf)
    assert message.startswith("cannot read a config file: ")
    assert "nano.yaml" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer.lr=-1"], "optimizer.lr=-1: must be greater than 0 (parts.adamw)"),
        (["optimizer.lr=abc"], "optimizer.lr=abc: must be a valid number (parts.adamw)"),
        (["optimizer.lr=true"], "optimizer.lr=true: must be a valid number (parts.adamw)"),
        (["optimizer.lr=nan"], "optimizer.lr=nan: must be a finite number (parts.adamw)"),
        (["optimizer.lr=inf"], "optimizer.lr=inf: must be a finite number (parts.adamw)"),
        (["optimizer.lr='inf'"], "optimizer.lr=inf: must be a valid number (parts.adamw)"),
        (["optimizer.lr=null"], "optimizer.lr=null: must be a valid number (parts.adamw)"),
        (["optimizer.betas=[0.9,x]"], "optimizer.betas.1=x: must be a valid number (parts.adamw)"),
        (["optimizer.betas=[0.9]"], "optimizer.betas=[0.9]: must have more in it (1 is missing)"),
        (["+optimizer.weight_decai=1"], "unknown key 'optimizer.weight_decai': parts.adamw has no argument"),
        (["+optimizer.fuzed=true"], "did you mean 'optimizer.fused'? It takes: params, lr, betas, fused"),
        (["model.width=8.5"], "model.width=8.5: must be a valid integer (parts.Model)"),
        (["model.width=true"], "model.width=true: must be a valid integer (parts.Model)"),
        (["model.width='8'"], "model.width=8: must be a valid integer (parts.Model)"),
        (["model.width=0"], "model.width=0: must be greater than or equal to 1 (parts.Model)"),
        (["objective.prediction=epsilonn"], "(parts.Objective); did you mean 'epsilon'?"),
        (["objective.prediction=epsilonn"], "objective.prediction=epsilonn: must be 'epsilon' or 'v_prediction'"),
        (["~objective.prediction"], "objective needs 'prediction' (parts.Objective): set objective.prediction"),
        (["+tuning.blocks={mid:0}"], "tuning.blocks.mid=0: must be greater than 0 (parts.tuning)"),
        (["logs.first.width=x"], "logs.first.width=x: must be a valid integer (parts.Model)"),
        (["logs.first._target_=parts.Modle"], "'parts.Modle' does not exist; did you mean 'Model'?"),
        (["logs.first._target_=nowhere.X"], "logs.first._target_=nowhere.X: 'nowhere' does not exist"),
        (["logs.first._target_=parts.x.y"], "logs.first._target_=parts.x.y: 'parts.x' does not exist"),
        (["logs.first._target_=parts.broken"], "logs.first._target_=parts.broken: is not callable"),
        (["logs.first._target_=3"], "logs.first._target_=3: must be a dotted name"),
    ],
)
def test_values_are_bound_to_constructors(conf: Path, words: list[str], message: str) -> None:
    assert message in refusal(conf, *words)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "parts.anything", "whatever": 1, "ghost": 3, "loose": None}, None),
        ({"_target_": "parts.anything", "number": "x"}, "it.number=x: must be a valid integer"),
        ({"_target_": "parts.anything", "sizes": [1, 2], "model": {"_target_": "parts.Model"}}, None),
        ({"_target_": "parts.anything", "sizes": [1, "b"]}, "it.sizes.1=b: must be a valid integer"),
        ({"_target_": "parts.anything", "sizes": "atuo"}, "did you mean 'auto'?"),
        ({"_target_": "parts.anything", "model": {"width": 1}}, "must be an object built by a _target_"),
        ({"_target_": "parts.anything", "size": {"h": 1}}, "it.size: needs a _target_ that builds a Size"),
        ({"_target_": "parts.anything", "model": {"_target_": "parts.Model", "width": -1}}, "it.model.width=-1"),
        ({"_target_": "parts.Model", "path": "${hydra:runtime.output_dir}"}, None),
        ({"_target_": "parts.Model", "_args_": [4]}, None),
        ({"_target_": "parts.Model", "_args_": [4.5]}, "it.width=4.5"),
        ({"_target_": "parts.wrapped", "gamma": 1}, None),
        ({"_target_": "parts.wrapped", "gama": 1}, "did you mean 'it.gamma'?"),
        ({"_target_": "builtins.dict", "a": 1}, None),
        ({"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3, "betas": [0.9, 0.95]}, None),
        ({"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3, "beta": [0.9, 0.95]}, "'it.betas'"),
        ({"_target_": "torch.optim.AdamW", "lr": 1e-3}, "it needs 'params'"),
    ],
)
def test_check_reads_any_signature(node: dict, message: str | None) -> None:
    cfg = OmegaConf.create({"it": node})
    if message is None:
        check(cfg)
        return
    with pytest.raises(ConfigError) as caught:
        check(cfg)
    assert message in str(caught.value)


def test_targets_inside_lists_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"them\.1\.width=no: must be a valid integer"):
        check(OmegaConf.create({"them": [{"_target_": "parts.Model"}, {"_target_": "parts.Model", "width": "no"}]}))


def test_a_number_written_as_text_becomes_a_number(conf: Path) -> None:
    cfg = compose("train", ["optimizer.lr='1e-3'", "optimizer.betas=['5e-1',0.9]"], conf)
    check(cfg)
    assert cfg.optimizer.lr == 1e-3
    assert list(cfg.optimizer.betas) == [0.5, 0.9]
    assert "greater than 0" in refusal(conf, "optimizer.lr='-1e-3'")


def test_only_targets_that_are_named_are_imported(conf: Path) -> None:
    (conf.parent / "heavy.py").write_text("raise ImportError('no such wheel')")
    check(compose("train", [], conf))
    message = refusal(conf, "logs.first._target_=heavy.X")
    assert message == "logs.first._target_=heavy.X: importing heavy failed: no such wheel"


def test_checking_takes_little_more_than_composing(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, relative to Hydra's own composing of the same config: 2.3 times here."""
    if sys.gettrace() is not None:
        pytest.skip("tracing, as for coverage, makes everything slower")
    composing, load = [0.0], Composer.load_unchecked

    def timed(*args, **kwargs):
        start = time.process_time()
        try:
            return load(*args, **kwargs)
        finally:
            composing[0] += time.process_time() - start

    monkeypatch.setattr(Composer, "load_unchecked", timed)
    ratios = []
    for _ in range(4):  # the first one imports what the config names
        composing[0], start = 0.0, time.process_time()
        check(compose("train", ["experiment=dreamy_style"], conf))
        ratios.append((time.process_time() - start) / composing[0])
    assert min(ratios[1:]) < 5, ratios


SCRIPT = """
from pathlib import Path
import parts
from sdft.config.command import command
from sdft.errors import UserError

def finish(folder: Path) -> None:
    (Path.cwd() / "finished").write_text("\\n".join([str(folder), *sorted(p.name for p in folder.iterdir())]))

@command("train", conf_dir=Path(__file__).parent / "conf", finish_sweep=finish)
def main(cfg):
    with open("ran", "a") as log:
        print(cfg.seed, cfg.model.width, type(cfg.optimizer.lr).__name__, file=log)
    if cfg.seed == 13:
        raise UserError("13 is unlucky: pass seed=14")
    if cfg.seed == 14:
        raise RuntimeError("a bug")
    return cfg.seed

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def run(conf: Path, python: WarmPython):
    folder = conf.parent
    (folder / "script.py").write_text(SCRIPT)

    def run(*words: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        (folder / "ran").unlink(missing_ok=True)
        done = python.complete(["script.py", *words], folder)
        return done, (folder / "ran").read_text().splitlines() if (folder / "ran").exists() else []

    return run


def test_a_command_runs_a_job(run) -> None:
    done, ran = run("model=sdxl", "optimizer.lr='1e-3'")
    assert (done.returncode, ran) == (0, ["0 320 float"]), done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["modle=nano"], "error: unknown key 'modle'; did you mean 'model'?"),
        (["--rank=8"], "error: '--rank=8' is not a flag; settings are written rank=value"),
        (["--cfg", "job", "modle=nano"], "error: unknown key 'modle'; did you mean 'model'?"),
        (
            ["-m", "model.width=1,2,0"],
            "error: job 3 of 3 (model.width=0): model.width=0: must be greater than or",
        ),
        (["-m", "modle=nano,sdxl"], "error: job 1 of 2 (modle=nano): unknown key 'modle'; did you mean 'model'?"),
        (["-m", "modl=nano", "seed=1,2"], "error: unknown key 'modl'; did you mean 'model'?"),
        (["-m", "modle=glob(*)"], "error: modle=glob(*) "),
        (["-m", "seed=interval(0,1)"], "error: interval(...) needs a sweeper that searches"),
    ],
)
def test_a_command_refuses_before_anything_runs(run, words: list[str], message: str) -> None:
    done, ran = run(*words)
    assert (done.returncode, ran, done.stdout) == (2, [], "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_a_command_prints_a_user_error_as_one_message(run) -> None:
    done, ran = run("seed=13")
    assert (done.returncode, len(ran)) == (2, 1)
    assert done.stderr == "error: 13 is unlucky: pass seed=14\n"


def test_a_command_tells_of_a_bug_in_three_lines(run, monkeypatch) -> None:
    done, _ = run("seed=14")
    assert done.returncode == 1
    what, where, how = done.stderr.splitlines()[-3:]
    assert what == "error: RuntimeError: a bug"
    assert "Traceback" in Path(where.split("its traceback is in ")[1].split(";")[0]).read_text()
    assert "report it" in how
    monkeypatch.setenv("SDFT_DEBUG", "1")
    assert "Traceback (most recent call last)" in run("seed=14")[0].stderr


def test_a_command_sweeps_and_finishes(run, conf: Path) -> None:
    done, ran = run("seed=1,2", "-m", "model=glob(*)", "optimizer.lr=0.1", r"hydra.sweep.dir='out/it\'s ${now:%f}'")
    assert done.returncode == 0, done.stderr
    assert [line.rsplit(" ", 1)[0] for line in ran] == ["1 8", "1 320", "2 8", "2 320"]
    folder, *names = (conf.parent / "finished").read_text().splitlines()
    assert "it's " in folder
    assert names == ["0", "1", "2", "3", "multirun.yaml"]


def test_a_run_has_one_folder_though_its_config_is_composed_twice(run, conf: Path) -> None:
    """The second time, `${now:}` is later: the locked folder must be the one that is written into."""
    with (conf / "train.yaml").open("a") as file:
        file.write("\nrun_dir: runs/${now:%f}\nhydra: {run: {dir: '${run_dir}'}}\n")
    done, ran = run("seed=5")
    assert (done.returncode, len(ran)) == (0, 1), done.stderr
    (folder,) = (conf.parent / "runs").iterdir()
    assert (folder / ".hydra").is_dir()


def test_a_command_sweeps_what_the_config_says(run, conf: Path) -> None:
    sweep = "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}"
    (conf / "experiment/sweep.yaml").write_text(sweep)
    done, ran = run("experiment=sweep")
    assert (done.returncode, len(ran)) == (0, 2), done.stderr


def test_a_sweep_runs_the_other_jobs_after_a_user_error(run, conf: Path) -> None:
    done, ran = run("-m", "seed=13,15")
    assert (done.returncode, len(ran)) == (2, 2)
    assert done.stderr.endswith("error: 13 is unlucky: pass seed=14\n")
    assert "Traceback" not in done.stderr
    assert (conf.parent / "finished").exists(), "the table also tells which job failed"


@pytest.mark.parametrize("words", [["--help"], ["--cfg", "job", "data=folder"], ["--info"], ["--hydra-help"]])
def test_a_command_leaves_hydras_own_flags_alone(run, words: list[str]) -> None:
    done, ran = run(*words)
    assert (done.returncode, ran) == (0, []), done.stderr
    assert done.stdout


def test_a_command_runs_from_a_saved_config(run, conf: Path) -> None:
    run("seed=5", "hydra.run.dir=first")
    done, ran = run("-cp", str(conf.parent / "first/.hydra"), "-cn", "config", "seed=6", "hydra.run.dir=second")
    assert (done.returncode, ran) == (0, ["6 8 float"]), done.stderr


def test_config_errors_are_user_errors() -> None:
    assert issubclass(ConfigError, UserError)
