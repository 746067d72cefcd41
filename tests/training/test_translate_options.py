"""Single options of kohya's sd-scripts and of OneTrainer, files that are no configs, and the command."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdft.config.command import compose
from sdft.errors import UserError
from sdft.training.translate import onetrainer
from sdft.training.translate.__main__ import translate
from sdft.training.translate.command_line import Command, hydra_value

FILES = Path(__file__).parents[1] / "fixtures" / "translate"


@pytest.fixture(autouse=True)
def beside_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the configs."""
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def one(text: str) -> Command:
    return translate(f"python sdxl_train_network.py --pretrained_model_name_or_path=m {text}", "train.sh", Path())


def of_onetrainer(**options: Any) -> Command:
    return translate(json.dumps({"training_method": "LORA", "model_type": onetrainer.MODEL, **options}), "c", Path())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "objective/weighting=uniform tuning.alpha=1 rank=4 lr_schedule=constant optimizer.lr=2e-06 epochs= "
             "trainer.max_steps=1600 data.bucket_step=null trainer.precision=32-true tuning=lora_unet_te"),
        ("--debiased_estimation_loss", "objective/weighting=debiased"),
        ("--debiased_estimation_loss --v_parameterization", "objective/weighting=uniform objective=v"),
        ("--loss_type huber", "objective/loss=huber objective.loss.c=0.1 objective.loss.schedule=snr"),
        ("--optimizer_type Adafactor", "optimizer=adafactor"),
        ("--optimizer_type came_pytorch.CAME", "optimizer=came"),
        ("--optimizer_type SGDNesterov --optimizer_args momentum=0.8", "optimizer=sgd optimizer.momentum=0.8"),
        ("--optimizer_type schedulefree.AdamWScheduleFree --lr_warmup_steps 7", "optimizer.warmup_steps=7 "
         "lr_schedule.warmup_steps=0"),
        ("--lr_scheduler warmup_stable_decay --lr_decay_steps 400", "lr_schedule.decay=0.25"),
        ("--lr_scheduler cosine_with_min_lr --lr_scheduler_min_lr_ratio 0.1", "lr_schedule=cosine "
         "lr_schedule.final=0.1"),
        ("--text_encoder_lr 0", "tuning=lora_unet"),
        ("--network_train_text_encoder_only --text_encoder_lr 1e-5", "optimizer.lr=1e-05 "
         "tuning.lr_scale.text_encoder=1 'tuning.parts=[text_encoder, text_encoder_2]'"),
        ("--resolution 768,1344", "size=1024"),
        ("--save_every_n_steps 100 --save_last_n_steps 300", "callbacks.lora_files.every=100 "
         "callbacks.lora_files.keep=4"),
        ("--fp8_base --mixed_precision bf16", "'model.quantization={unet: fp8}'"),
        ("--network_module lycoris.kohya --network_args algo=diag-oft", "tuning.method=oft tuning.layers=conv"),
        ("--random_crop --cache_latents", "data.crop=random data.variants=4 data.cache=ram"),
    ],
)  # fmt: skip
def test_options_of_kohya(text: str, expected: str) -> None:
    found = one(text).lines()
    for line in shlex.split(expected):
        assert line in found if not line.endswith("=") else not any(f.startswith(line) for f in found)


def test_what_differs_by_default_is_said() -> None:
    said = one("--optimizer_type Adafactor --lr_warmup_steps 10 --ip_noise_gamma 0.1").text()
    for words in ("optimizer_args.relative_step: True by default there", "of 0 there", "a tenth of the images"):
        assert words in said
    assert "safeguard_warmup: False by default there" in one("--optimizer_type Prodigy").text()


def test_weightings_that_are_multiplied_there_are_named() -> None:
    command = one("--min_snr_gamma 5 --debiased_estimation_loss")
    assert "objective/weighting=min_snr" in command.lines()
    assert "min_snr_gamma is taken" in command.without["debiased_estimation_loss"]


def test_datasets_of_several_sizes_and_settings(tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(
        "[general]\nshuffle_caption = true\n[[datasets]]\nresolution = 512\nbatch_size = 4\n"
        '[[datasets.subsets]]\nimage_dir = "/a"\n[[datasets]]\nresolution = [1024, 1024]\nbatch_size = 1\n'
        '[[datasets.subsets]]\nimage_dir = "/b"\nnum_repeats = 2\n',
        encoding="utf-8",
    )
    command = one("--dataset_config data.toml")
    assert {"data.sizes={512: 1, 1024: 1}", "size=1024", "data.batch_size=4", "data.train.repeats={own: 1, own_2: 2}",
            "~data.train.sources.others"} <= set(command.lines())  # fmt: skip
    assert any("train_batch_size: 4, 1 in parts of the data set" in line for line in command.differs)
    assert "+data.train.sources.own_2" in command.overrides
    compose("train", [line for line in command.lines() if not line.startswith("tuning.")])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "objective/weighting=uniform tuning.alpha=1 rank=16 lr_schedule=constant lr_schedule.warmup_steps=200 "
             "epochs=100 size=512 data.bucket_step=64 'tuning.stop_at={text_encoder: 0.3, text_encoder_2: 0.3}' "
             "trainer.precision=16-mixed"),
        ({"optimizer": "ADAMW_8BIT", "train_unet": True, "unet_learning_rate": 1e-5}, "optimizer=adamw_8bit "
         "optimizer.lr=1e-05"),
        ({"optimizer": {"optimizer": "CAME"}}, "'optimizer.betas=[0.9, 0.999, 0.9999]' optimizer.weight_decay=0.01"),
        ({"peft_type": "LOKR", "lokr_dim": 4}, "tuning.method=lokr rank=4"),
        ({"force_v_prediction": True}, "objective=v"),
        ({"learning_rate_scheduler": "COSINE_WITH_RESTARTS", "learning_rate_cycles": 3}, "lr_schedule=cosine_restarts "
         "lr_schedule.cycles=3"),
        ({"unet": {"train": False}, "text_encoder_2": {"train": False}}, "'tuning.parts=[text_encoder]' "
         "~tuning.lr_scale.text_encoder_2"),
    ],
)  # fmt: skip
def test_options_of_onetrainer(options: dict[str, Any], expected: str) -> None:
    found = of_onetrainer(**options).lines()
    assert set(shlex.split(expected)) <= set(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello there", "neither a config of OneTrainer"),
        ("accelerate launch flux_train_network.py --pretrained_model_name_or_path=f", "flux_train_network.py"),
        ("accelerate launch train_network.py --pretrained_model_name_or_path=f", "train_network.py"),
        ("python sdxl_train.py --pretrained_model_name_or_path=f --v2", "v2: is a config for Stable Diffusion 2"),
        ('pretrained_model_name_or_path = "f"\nclip_l = "c"\n', "clip_l"),
        ("python sdxl_train.py --learning_rate=1", "pretrained_model_name_or_path: is missing"),
        ("python sdxl_train.py --pretrained_model_name_or_path=f --learning_rate=fast", "learning_rate=fast"),
        ("python sdxl_train.py --pretrained_model_name_or_path='f", "a quote is not closed"),
        ("python sdxl_train.py --config_file=absent.toml", "config_file=absent.toml"),
        ('network_dim = \n', "nor TOML"),
        ('[[datasets]]\nresolution = 1\nsubsets = []\n#network_dim', "dataset config"),
        ('{"model_type": "FLUX_DEV_1"}', "model_type=FLUX_DEV_1"),
        ('{"training_method": "FINE_TUNE_VAE", "model_type": "STABLE_DIFFUSION_XL_10_BASE"}', "FINE_TUNE_VAE"),
        ('{"LoRA_type": "Standard"}', "kohya_ss GUI"),
        ('{"a": 1}', "neither a config of OneTrainer"),
        ('{"a": ', "is not JSON"),
        ('{"training_method": "LORA", "epochs": "many"}', "epochs=many"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_translated_is_named_with_its_key(text: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as raised:
        translate(text, "my file", Path())
    assert str(raised.value).startswith("my file: ")


@pytest.mark.parametrize("stream", [False, True])
def test_the_command(stream: bool) -> None:
    text = Path("kohya_full.sh").read_text(encoding="utf-8")
    files = ["-"] if stream else ["kohya_full.sh", "onetrainer_full.json"]
    run = subprocess.run(
        [sys.executable, "-m", "sdft.training.translate", *files], input=text, capture_output=True, text=True
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("python train.py model=sdxl \\\n") == len(files)
    assert run.stdout.startswith("python train.py" if stream else "# kohya_full.sh\npython train.py")
    Path("none.json").write_text('{"model_type": "SANA"}', encoding="utf-8")
    run = subprocess.run([sys.executable, "-m", "sdft.training.translate", "none.json"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "")
    assert "none.json: model_type=SANA" in run.stderr


def test_numbers_and_dicts_in_hydras_notation() -> None:
    assert [hydra_value(v) for v in (1.0, 0.0001, 1e-7, True, None, 3)] == ["1", "0.0001", "1e-07", "true", "null", "3"]
    assert hydra_value({512: 1, "*attn1*": 4, "a b": "x y"}) == "{512: 1, *attn1*: 4, a\\ b: 'x y'}"


def test_a_comment_cannot_end_early() -> None:
    """A line break in a value would make a command of what follows it."""
    options = {"strange\nrm -rf x": 1, "loss_weight_fn": "A\nrm -rf x", "base_model_name": "a\nrm -rf x"}
    lines = of_onetrainer(**options).text("my\nrm -rf x").splitlines()
    assert sum("rm -rf x" in line for line in lines) >= 4
    assert not any(line.startswith("rm") for line in lines)
