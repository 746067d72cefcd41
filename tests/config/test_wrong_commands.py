"""Wrong command lines fail within seconds, before any model is loaded, and say which key and what instead."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image
from warm import WarmPython

import train
from sdft.config.keys import ConfigError
from sdft.config.run_folder import refuse_folder
from sdft.models import load

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    ("experiment=dremy_style", "experiment", "dreamy_style"),
    ("modle=nano", "modle", "model"),
    ("model=nanoo", "model", "nano"),
    ("tuning=lora_unte", "tuning", "lora_unet"),
    ("tuning=full rank=8", "rank", "lora_unet"),
    ("rank=-4", "rank", "greater than or equal to 1"),
    ("rank=0", "rank", "greater than or equal to 1"),
    ("verdict=null", "verdict=null", "write verdict=none"),
    ("~verdict", "~verdict", "write verdict=none"),
    ("~objective dry_run=true", "~objective", "leaves out what this command needs"),
    ("~callbacks dry_run=true", "~callbacks", "leaves out what this command needs"),
    ("rank=eight", "rank", "int"),
    ("rank=8.5", "rank", "int"),
    ("rank=4,8", "rank", "-m"),
    ("tuning.alpha=-1", "tuning.alpha", "greater than 0"),
    ("tuning.method=lorra", "tuning.method", "lora"),
    ("tuning.parts=[unett]", "tuning.parts", "unet"),
    ("tuning.lr_scale={text_encoder: 0.1}", "tuning.lr_scale", "lora_unet_te"),
    ("tuning.new_words={word: a cat}", "tuning.new_words", "lora_unet_te"),
    ("optimizer.lr=-1", "optimizer.lr", "greater than 0"),
    ("optimizer.lr=fast", "optimizer.lr", "number"),
    ("optimizer.lrr=1e-3", "optimizer.lrr", "optimizer.lr"),
    ("lr=1e-3", "lr", "optimizer.lr"),
    ("optimizer.betas=[0.9,1.5]", "optimizer.betas", "less than 1"),
    ("trainer.max_steps=0", "trainer.max_steps", "greater than or equal to 1"),
    ("trainer.max_step=10", "trainer.max_step", "trainer.max_steps"),
    ("trainer.precision=bf16-mixd", "trainer.precision", "bf16-mixed"),
    ("objective=epsilom", "objective", "epsilon"),
    ("objective.zero_terminal_snr=true", "objective.zero_terminal_snr", "v_zero_snr"),
    ("objective=v objective/weighting=debiased", "objective/weighting", "min_snr"),
    ("objective.weighting.gamma=-5", "objective.weighting.gamma", "greater than 0"),
    ("objective.timesteps.low=0.9 objective.timesteps.high=0.1", "objective.timesteps", "below"),
    ("data=folder", "data.root", "data.root="),
    ("data=folder data.root=/does/not/exist", "data.root", "no such folder"),
    ("data=folder data.root={empty}", "data.root", "at least 2"),
    ("data=folder data.root={uncaptioned}", "data.root", "data.default_caption"),
    ("data=folder data.root={uncaptioned} data.default_caption=x caption='{{captoin}}'", "caption=", "{caption}"),
    ("size=100000000", "size=100000000", "less than or equal to 16384"),
    ("size=0", "size=0", "greater than or equal to 1"),
    ("data.batch_size=100000000", "data.batch_size", "less than or equal to 65536"),
    ("rank=99999999", "rank", "less than or equal to 4096"),
    ("trainer.max_steps=99999999999", "trainer.max_steps", "less than or equal to 1000000000"),
    ("optimizer.lr=1e300", "optimizer.lr", "less than or equal to 1000000000000000"),
    ("data.num_workers=100000", "data.num_workers", "less than or equal to 1024"),
    ("data.train.num_scenes=99999999", "data.train.num_scenes", "less than or equal to 1000000"),
    ("seed=99999999999999999999", "seed", "less than or equal to"),
    ("trainer.devices=0", "trainer.devices", "greater than or equal to 1"),
    ("trainer.devices=-2", "trainer.devices", "-1"),
    ("trainer.devices=1000000", "trainer.devices", "less than or equal to 1024"),
    ("trainer.precision=bf16-true", "trainer.precision", "bf16-mixed"),
    ("trainer.num_nodes=2 trainer.devices=1", "trainer.num_nodes", "srun or torchrun"),
    ("data=webdataset data.shards='{{0..999999999999}}.tar'", "data.shards", "more than 100,000 shards"),
    ("data=webdataset data.shards='{{a..z}}{{0..9999}}.tar'", "data.shards", "more than 100,000 shards"),
    ("data=webdataset data.shards='{{0..5.tar'", "data.shards", "unclosed brace"),
    ("caption='{{caption.__class__}}'", "caption=", "nothing else in the braces"),
    ("name=../../x", "name=", "digits"),
    ("name=''", "name=", "digits"),
    ("run_dir=", "run_dir", "empty"),
    ("run_dir={empty}/../file.txt", "run_dir", "is a file"),
    ("run_dir={empty}/../file.txt/x", "run_dir", "file.txt is a file"),
    (f"run_dir={'x' * 300}", "run_dir", "too long"),
    (f"name={'x' * 300}", "name", "too long"),
    ("verdict.reference=3", "verdict.reference", "built by a _target_"),
    ("data=folder data.root={unclosed}", "metadata.csv, in the row of line 3", "a quote that is not closed"),
    ("data=folder data.root={nameless}", "metadata.csv", "no column file_name"),
    ("strategy=fsdp trainer.strategy.shard_ranks=1", "trainer.strategy.shard_ranks", "greater than or equal to 2"),
    ("trainer.strategy.shard_ranks=2", "trainer.strategy.shard_ranks", "with strategy=auto; strategy=fsdp has it"),
    ("trainer.deterministic=perhaps", "trainer.deterministic", "warn"),
    ("data.batch_size=0", "data.batch_size", "greater than or equal to 1"),
    ("data.caption_dropout=1.5", "data.caption_dropout", "less than or equal to 1"),
    ("data.crop=random", "data.crop", "data=folder"),
    ("data=folder data.root={uncaptioned} data.default_caption=x data.crop=random", "data.crop", "data.cache=off"),
    ("callbacks.ema.decay=1.0", "callbacks.ema.decay", "less than 1"),
    ("sampler=eular", "sampler", "euler"),
    ("sampler.steps=-3", "sampler.steps", "greater than or equal to 1"),
    ("style=dreammy", "dreammy", "dreamy"),
    ("size=60", "size", "64"),
    ("seed=abc", "seed", "int"),
    ("resume=/no/such/run", "resume", "run folder"),
    ("+colour=red", "colour", "key"),
    ("dreamy_style", "dreamy_style", "experiment=dreamy_style"),
]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """An empty folder, folders with pictures and no captions or a bad table, and a file."""
    tables = {"uncaptioned": None, "unclosed": 'file_name,text\na.png,a\nb.png,"b\nc.png,c\n', "nameless": "a,b\n1,2\n"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("mine")
    for folder, table in tables.items():
        (tmp_path / folder).mkdir()
        for name in ("a", "b", "c"):
            Image.new("RGB", (80, 64), "red").save(tmp_path / folder / f"{name}.png")
        if table:
            (tmp_path / folder / "metadata.csv").write_text(table)
    return {name: str(tmp_path / name) for name in ("empty", *tables)}


@pytest.mark.parametrize(("line", "key", "remedy"), CASES, ids=[line for line, _, _ in CASES])
def test_a_wrong_command_line_names_the_key_and_the_remedy(
    line: str, key: str, remedy: str, folders, monkeypatch, capsys, tmp_path
) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded before the command line was found wrong")

    monkeypatch.setattr(load, "find_checkpoint", refuse)
    monkeypatch.chdir(tmp_path)
    known = "tuning.lr_scale={" in line or "tuning.new_words={" in line
    words = [line] if known else line.format(**folders).split()
    words = words if "run_dir=" in line else [f"run_dir={tmp_path / 'run'}", *words]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1, message
    assert key in message
    assert remedy in message


@pytest.mark.parametrize("line", ["experiment=dremy_style", "rank=-4", "data=folder data.root=/does/not/exist"])
def test_a_wrong_command_exits_with_2_and_no_traceback(line: str, python: WarmPython, tmp_path: Path) -> None:
    done = python.complete([str(ROOT / "train.py"), f"run_dir={tmp_path}", *line.split()], tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert done.stdout == ""


def test_sdxl_without_weights_and_network_says_so_in_one_line(python: WarmPython, tmp_path: Path) -> None:
    words = ["model=sdxl", "model.weights=nobody/no-such-model", "size=64", "logger=csv", f"run_dir={tmp_path / 'run'}"]
    done = python.complete([str(ROOT / "train.py"), *words], tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: model.weights=nobody/no-such-model: not found")


def test_links_out_of_a_run_folder_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Hydra and the logger write their files through links; a link to a folder, and one inside of the run, are fine."""
    run, mine = tmp_path / "run", tmp_path / "mine.yaml"
    (run / ".hydra").mkdir(parents=True)
    mine.write_text("precious: 1\n", encoding="utf-8")
    (tmp_path / "disk").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    (run / "a.txt").write_text("a")
    (run / "b.txt").symlink_to(run / "a.txt")
    refuse_folder("run_dir", run)
    for name in ("hparams.yaml", ".hydra/config.yaml", ".lock"):
        (run / name).symlink_to(mine)
        with pytest.raises(ConfigError, match=r"is a link to .*mine\.yaml; put a copy in its place, or remove it"):
            refuse_folder("run_dir", run)
        (run / name).unlink()
    assert mine.read_text(encoding="utf-8") == "precious: 1\n"
