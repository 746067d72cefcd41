"""Configs of kohya's sd-scripts and of OneTrainer become the command lines that they stand for, and nothing gets lost.

The expected overrides are written by hand, from what the options of these programs do.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from sdft.config.command import build, check, compose
from sdft.optimizers.schedules import refuse_schedule
from sdft.training.translate import kohya, onetrainer
from sdft.training.translate.__main__ import translated
from sdft.training.translate.command_line import Command

ROOT = Path(__file__).parents[2]
FILES = ROOT / "tests" / "fixtures" / "translate"
ALPHA_INIT = "tuning.method=lora tuning.init=kaiming"
EXPECTED = {
    # 8 epochs of 10 repeats; batches of 2 and 2 accumulated.
    "kohya_style.sh": f"""
        model=sdxl model.weights=/models/sd_xl_base_1.0.safetensors model.gradient_checkpointing=true
        tuning=lora_unet rank=32 tuning.alpha=16 tuning.layers=all {ALPHA_INIT}
        objective=epsilon objective/weighting=min_snr objective.weighting.gamma=5
        optimizer=adamw_8bit optimizer.lr=0.0001 'optimizer.betas=[0.9, 0.99]' optimizer.weight_decay=0.1
        lr_schedule=cosine lr_schedule.warmup_steps=100 lr_schedule.final=0
        epochs=80 trainer.max_steps=1000000 trainer.accumulate_grad_batches=2 trainer.gradient_clip_val=1
        trainer.precision=bf16-mixed data.batch_size=2
        data=folder "data.root='images/10_ink wash'" "default_caption='ink wash'" data.caption_dropout=0
        size=1024 data.bucket_step=64 data.no_upscale=true data.cache=disk
        callbacks.lora_files.every=500 callbacks.previews.every=250 ~callbacks.ema
        "prompts=['a cat in the garden', 'a castle, at night']" sampler=euler_a
        "callbacks.previews.prompts=[{{prompt: 'a cat in the garden', negative: blurry, seed: 1, cfg: 7, steps: 28,
         size: [1024, 1024]}}, {{prompt: 'a castle, at night', steps: 30}}]"
        logger=csv_tensorboard seed=42 name=watercolour run_dir=/runs/style/watercolour
    """,
    # 5 percent of 2000 steps is 100; the rates of the text encoders are half and a fifth of the UNet's.
    "kohya_character.toml": f"""
        model=sdxl model.weights=stabilityai/stable-diffusion-xl-base-1.0 model.gradient_checkpointing=false
        model.dtype.unet=fp16 model.dtype.text_encoder=fp16 model.dtype.text_encoder_2=fp16 model.prompt_chunks=2
        tuning=lora_unet_te rank=16 tuning.alpha=1 {ALPHA_INIT}
        tuning.layers=conv tuning.conv_rank=8 tuning.conv_alpha=4 tuning.lora_plus=4 tuning.max_norm=1
        tuning.lr_scale.text_encoder=0.5 tuning.lr_scale.text_encoder_2=0.2
        objective=epsilon objective/weighting=uniform
        optimizer=prodigy optimizer.lr=1 'optimizer.betas=[0.9, 0.999]' optimizer.weight_decay=0.01 optimizer.d_coef=0.8
        lr_schedule=cosine_restarts lr_schedule.cycles=3 lr_schedule.final=0 lr_schedule.warmup_steps=100
        trainer.max_steps=2000 trainer.accumulate_grad_batches=1 trainer.gradient_clip_val=1 trainer.precision=16-mixed
        data=mix data.batch_size=4 data.train.sources.own.root=/data/zorbix data.train.sources.others.root=/data/women
        "data.train.sources.own.default_caption='zorbix woman'" data.train.sources.others.default_caption=woman
        data.train.sources.others.loss_weight=0.5 'data.train.weights={{own: 1, others: 1}}'
        '+data.train.sources.own.tags={{_target_: sdft.data.captions.Tags, shuffle: true, drop: 0.1, keep_first: 1}}'
        data.caption_dropout=0 data.flip=true size=1024 data.bucket_step=64 data.cache=off
        ~callbacks.ema logger=csv_wandb name=zorbix
    """,
    # The command line has precedence over its config_file.
    "kohya_full.sh": """
        model=sdxl model.weights=base.safetensors model.vae=vae.safetensors model.gradient_checkpointing=true
        ++model.dtype.unet=bf16 model.attention=xformers
        tuning=full 'tuning.parts=[unet, text_encoder, text_encoder_2]'
        '++tuning.lr_scale={text_encoder: 0.5, text_encoder_2: 0.25}'
        objective=epsilon objective/weighting=uniform
        objective/loss=smooth_l1 objective.loss.c=0.2 objective.loss.schedule=snr
        optimizer=adafactor optimizer.lr=4e-06 optimizer.weight_decay=0 optimizer.clip_threshold=1 fused_backward=true
        lr_schedule=constant lr_schedule.warmup_steps=200
        trainer.max_steps=10000 trainer.accumulate_grad_batches=1 trainer.gradient_clip_val=0
        trainer.precision=bf16-mixed
        data=folder data.root=/data/all data.batch_size=8 data.caption_dropout=0.05 size=1024 data.bucket_step=64
        data.cache=off ~callbacks.ema logger=csv export.dtype=bf16 export.single_file=true
    """,
    # LyCORIS' preset attn-mlp has no convolutions; 1024 is not asked for.
    "kohya_lycoris.bat": r"""
        model=sdxl "model.weights='C:\\models\\base.safetensors'" model.gradient_checkpointing=false
        "model.loras=[{lora: 'C:\\loras\\detail.safetensors', scale: 0.7}]"
        model.dtype.unet=fp32 model.dtype.text_encoder=fp32 model.dtype.text_encoder_2=fp32
        tuning=lora_unet rank=16 tuning.alpha=8 tuning.method=loha tuning.layers=all
        tuning.start=old.safetensors
        objective=epsilon objective/weighting=uniform objective.normalise_mask=false
        objective/noise=offset objective.noise.strength=0.1 objective.noise.random=true objective.noise.adaptive=0.01
        optimizer=lion optimizer.lr=0.0002 'optimizer.betas=[0.9, 0.99]' optimizer.weight_decay=0
        lr_schedule=constant lr_schedule.warmup_steps=0
        trainer.max_steps=1000 trainer.accumulate_grad_batches=1 trainer.gradient_clip_val=1 trainer.precision=32-true
        data=mix "data.train.sources.own.root='C:\\data\\set'" "data.train.sources.others.root='C:\\data\\reg'"
        'data.train.weights={own: 1, others: 1}' data.batch_size=1 data.masks=alpha data.caption_dropout=0
        size=768 data.bucket_step=null data.cache=ram ~callbacks.ema logger=csv
    """,
    # SNR / (SNR + 1), capped at 1000, is min_snr of v with gamma=1000.
    "kohya_vpred.sh": r"""
        model=sdxl model.weights=vpred.safetensors model.gradient_checkpointing=false
        model.dtype.unet=fp32 model.dtype.text_encoder=fp32 model.dtype.text_encoder_2=fp32
        tuning=lora_unet_te rank=8 tuning.alpha=8 tuning.method=dora tuning.init=kaiming
        tuning.layers=conv tuning.conv_rank=8 tuning.conv_alpha=8 tuning.train_norms=true
        tuning.lr_scale.text_encoder=0.1 tuning.lr_scale.text_encoder_2=0.1
        objective=v_zero_snr objective/weighting=min_snr objective.weighting.gamma=1000
        objective/noise=pyramid objective.noise.levels=8 objective.noise.discount=0.4
        objective.input_perturbation=0.1 objective.timesteps.low=0.1 objective.timesteps.high=0.9
        objective.normalise_mask=false data.masks=true
        optimizer=prodigy optimizer.lr=0.0001 'optimizer.betas=[0.9, 0.999]' optimizer.weight_decay=0 optimizer.d_coef=1
        lr_schedule=polynomial lr_schedule.power=2 lr_schedule.final=0 lr_schedule.warmup_steps=0
        trainer.max_steps=500 trainer.devices=2 trainer.accumulate_grad_batches=1 trainer.gradient_clip_val=1
        trainer.precision=32-true data=folder data.root=/data/v data.batch_size=1 data.caption_dropout=0
        "caption='{{best}}, it\\'s {caption}'" size=1024 data.bucket_step=null data.cache=off data.crop=random
        data.augmentation.hue=0.02 data.augmentation.saturation=0.1 ~callbacks.ema logger=csv
    """,
    # The scaler multiplies the rate by the square root of the batch of 4; 20 epochs of 2 repeats.
    "onetrainer_style.json": f"""
        model=sdxl model.weights=stabilityai/stable-diffusion-xl-base-1.0 model.gradient_checkpointing=true
        model.dtype.unet=bf16 model.dtype.text_encoder=bf16 model.dtype.text_encoder_2=bf16
        tuning=lora_unet rank=16 tuning.alpha=1 tuning.layers=all {ALPHA_INIT}
        objective=epsilon objective/weighting=min_snr objective.weighting.gamma=5
        optimizer=adamw optimizer.lr=0.0006 'optimizer.betas=[0.9, 0.999]' optimizer.weight_decay=0.01
        lr_schedule=cosine lr_schedule.warmup_steps=100 lr_schedule.final=0.1
        epochs=40 trainer.max_steps=1000000 trainer.accumulate_grad_batches=2 trainer.gradient_clip_val=1
        trainer.precision=bf16-mixed
        data=folder "data.root='/data/ink drawings'" data.batch_size=4 data.tags.shuffle=true data.tags.keep_first=2
        data.caption_dropout=0 'data.encoder_dropout=[0.05, 0.05]' size=1024 data.bucket_step=64
        data.cache=disk data.cache_dir=workspace-cache/ink data.crop=random data.variants=3
        data.augmentation.rotation=3 data.augmentation.brightness=0.1
        callbacks.ema.decay=0.995 callbacks.ema.offload=true callbacks.previews.every=200 callbacks.last.keep=3
        "prompts=['an ink drawing of a fox']"
        "callbacks.previews.prompts=[{{prompt: 'an ink drawing of a fox', size: [1024, 1024]}}]"
        logger=csv_tensorboard name=ink_style "run_dir='C:/OneTrainer/workspace/ink'"
    """,
    # Text encoder 1 stops after 10 of 50 epochs; the embeddings have five times the UNet's rate.
    "onetrainer_character.json": f"""
        model=sdxl model.weights=/models/base.safetensors model.gradient_checkpointing=true
        'model.quantization={{unet: fp8}}' model.dtype.text_encoder=fp16 model.dtype.text_encoder_2=fp16
        tuning=lora_unet_te rank=32 tuning.alpha=16 {ALPHA_INIT}
        tuning.layers=conv tuning.conv_rank=32 tuning.conv_alpha=16
        tuning.lr_scale.text_encoder=0.25 tuning.lr_scale.text_encoder_2=0.5 +tuning.lr_scale.words=5
        'tuning.stop_at={{text_encoder: 0.2}}'
        "tuning.new_words={{zorbix: 'young woman'}}" 'tuning.vectors={{zorbix: 4}}'
        objective=epsilon objective/weighting=uniform objective.outside=0.2 objective.normalise_mask=true
        optimizer=prodigy optimizer.lr=0.0002 'optimizer.betas=[0.9, 0.999]' optimizer.weight_decay=0
        optimizer.d_coef=0.5
        lr_schedule=rex lr_schedule.warmup_steps=0 lr_schedule.final=0
        epochs=50 trainer.max_steps=1000000 trainer.accumulate_grad_batches=1 trainer.gradient_clip_val=1
        trainer.precision=16-mixed data=mix data.batch_size=2 data.masks=true data.flip=true
        data.train.sources.own.root=/data/face ~data.train.sources.others 'data.train.repeats={{own: 3, own_2: 1}}'
        '+data.train.sources.own_2={{_target_: sdft.data.sources.Folder, root: /data/body, split: train,
         caption: ${{caption}}, default_caption: ${{default_caption}}, loss_weight: 0.8}}'
        data.caption_dropout=0 size=1024 'data.sizes={{768: 1, 1024: 1}}' data.bucket_step=64 data.cache=disk
        ~callbacks.ema logger=csv
    """,
    "onetrainer_full.json": """
        model=sdxl model.weights=/models/base.safetensors model.vae=/models/vae model.gradient_checkpointing=true
        ++model.dtype.unet=bf16 model.dtype.text_encoder=bf16 model.dtype.text_encoder_2=bf16 model.attention=xformers
        tuning=full 'tuning.parts=[unet, text_encoder]' '++tuning.lr_scale={text_encoder: 0.2}'
        objective=epsilon objective/weighting=p2 objective.weighting.gamma=1 objective.weighting.k=1
        optimizer=adafactor optimizer.lr=1e-05 optimizer.weight_decay=0 optimizer.clip_threshold=1 fused_backward=true
        lr_schedule=constant lr_schedule.warmup_steps=200
        epochs=10 trainer.max_steps=1000000 trainer.accumulate_grad_batches=1 trainer.gradient_clip_val=0
        trainer.precision=bf16-mixed data=folder data.root=/data/all data.batch_size=8 data.caption_dropout=0
        size=1024 data.bucket_step=64 data.cache=off ~callbacks.ema callbacks.last.every=500
        logger=csv_tensorboard export.dtype=bf16 export.single_file=true name=tuned
    """,
    # OneTrainer's standard deviation is noising_weight + 1; all that trains stops after 9 of 12 epochs.
    "onetrainer_dora.json": """
        model=sdxl model.weights=/models/base.safetensors model.gradient_checkpointing=true
        'model.quantization={unet: nf4}' model.dtype.text_encoder=bf16 model.dtype.text_encoder_2=bf16
        tuning=lora_unet rank=8 tuning.alpha=8 tuning.method=dora tuning.dropout=0.1
        tuning.layers=conv "tuning.include=['unet.*attn1*', 'unet.*ff.net*']" tuning.start=/loras/before.safetensors
        objective=epsilon objective/weighting=uniform
        objective/loss=huber objective.loss.c=0.1 objective.loss.schedule=constant
        objective/timesteps=logit_normal objective.timesteps.mean=-0.5 objective.timesteps.std=1.2
        optimizer=lion optimizer.lr=0.0002 'optimizer.betas=[0.9, 0.999]' optimizer.weight_decay=0.05
        lr_schedule=constant lr_schedule.warmup_steps=200
        epochs=9 trainer.max_steps=1000000 trainer.accumulate_grad_batches=1 trainer.gradient_clip_val=1
        trainer.precision=bf16-mixed data=folder data.root=/data/product data.batch_size=1 data.caption_dropout=0
        size=512 data.bucket_step=64 data.cache=disk ~callbacks.ema logger=csv_tensorboard
    """,
    # The schedule-free optimizer has its own warm-up.
    "onetrainer_vpred.json": """
        model=sdxl model.weights=/models/vpred model.gradient_checkpointing=true
        ++model.dtype.unet=fp32 model.dtype.text_encoder=fp32 model.dtype.text_encoder_2=fp32
        tuning=words "tuning.new_words={gizmo: 'small machine'}" 'tuning.vectors={gizmo: 2}'
        objective=v_zero_snr objective/weighting=uniform objective.input_perturbation=0.1
        objective/noise=offset objective.noise.strength=0.05 objective.timesteps.low=0.2 objective.timesteps.high=1
        optimizer=schedule_free_adamw optimizer.lr=0.003 'optimizer.betas=[0.9, 0.999]' optimizer.weight_decay=0
        optimizer.warmup_steps=200 lr_schedule=constant lr_schedule.warmup_steps=0
        epochs=30 trainer.max_steps=1000000 trainer.accumulate_grad_batches=1 trainer.gradient_clip_val=1
        trainer.precision=32-true data=folder data.root=/data/thing data.batch_size=1 data.caption_dropout=0
        size=1024 data.bucket_step=null data.cache=disk ~callbacks.ema logger=csv_tensorboard
    """,
}
COMMENTS = {
    "kohya_style.sh": ["lerning_rate; did you mean 'learning_rate'?", "min_bucket_reso=512", "a tenth of the images"],
    "kohya_character.toml": ["wandb_api_key: wandb login", "as many as own images"],
    "kohya_full.sh": ["lowram: ", "subfolders N_NAME"],
    "kohya_lycoris.bat": [
        "network_args.factor=8",
        "network_args.algoo",
        "network_args.conv_dim=4",
        "network_dropout=0.1",
    ],
    "kohya_vpred.sh": ["noise_offset=0.05", "conditioning_data_dir", "ProdigyPlusScheduleFree", "falls to 0 over"],
    "onetrainer_style.json": ["lora_rnak; did you mean 'lora_rank'?", "backup_after=30 MINUTE", "secrets"],
    "onetrainer_character.json": ["concept women", "text_encoder_2.stop_training_after=500 STEP", "the word is zorbix"],
    "onetrainer_full.json": ["text.prompt_source=filename"],
    "onetrainer_dora.json": ["Huber's loss there", "cloud", "all parts stop after 9"],
    "onetrainer_vpred.json": ["timestep_distribution=SIGMOID", "generalized_offset_noise", "DEBIASED_ESTIMATION"],
}


@pytest.fixture(autouse=True)
def beside_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the configs with a folder of images beside it."""
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)
    (tmp_path / "images" / "10_ink wash").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


def through_shell(text: str) -> list[str]:
    """The words that a shell gives to `train.py`."""
    script = re.sub(r"^python train.py", 'printf "%s\\\\0"', text)
    printed = subprocess.run(["bash", "-e"], input=script, capture_output=True, text=True, check=True).stdout
    return printed.split("\0")[:-1]


def lines_of(text: str) -> list[str]:
    return [re.sub(r"\s+", " ", word) for word in shlex.split(text)]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_config_becomes_the_command_that_it_stands_for(name: str) -> None:
    assert sorted(translated(name).lines()) == sorted(lines_of(EXPECTED[name]))


@pytest.mark.parametrize("name", EXPECTED)
def test_the_printed_command_is_one_of_the_shell_and_of_hydra(name: str) -> None:
    """The text goes through a shell, its comments too, and what comes out composes and builds."""
    text = translated(name).text()
    overrides = through_shell(text)
    assert sorted(overrides) == sorted(lines_of(EXPECTED[name]))
    cfg = compose("train", overrides)
    check(cfg)
    build(cfg.tuning)
    build(cfg.objective)
    optimizer = build(cfg.optimizer)
    if cfg.optimizer._target_.rpartition(".")[2] != "adamw_8bit":
        refuse_schedule(optimizer, build(cfg.lr_schedule))


@pytest.mark.parametrize("name", EXPECTED)
def test_every_key_of_the_config_is_in_the_command_or_in_a_comment(name: str) -> None:
    command = translated(name)
    said = command.text()
    for wanted in COMMENTS[name]:
        assert wanted in " ".join(re.sub(r"\n#\s*", " ", said).split())
    text = Path(name).read_text(encoding="utf-8")
    keys = (
        onetrainer.flattened(json.loads(text))
        if name.endswith(".json")
        else kohya.kohya_files.read(text, name, Path()).values
    )
    accounted = {*command.cited, *command.unknown, *command.same}
    assert set(keys) <= accounted
    assert "do-not-print" not in said
    assert "private.example" not in said


TEXTS = (
    "a b", "it's", 'say "x"', "C:\\models\\", "a, b", "true", "1e-3", "01", "${x}", "a\\${b}", "a\\'b", "{caption}, x",
    "", "~/x", "$HOME", "a=b", "ü ö", "#x", "16-mixed", "null", "!x", "`id`",
)  # fmt: skip


def test_texts_survive_shell_and_hydra() -> None:
    command = Command()
    command.set("model", "sdxl")
    command.set("prompts", TEXTS)
    for number, option in enumerate(("default_caption", "caption", "word", "subject", "style", "model.vae")):
        command.set(option, TEXTS[number])
    printed = through_shell(command.text())
    cfg = compose("train", printed)
    assert list(cfg.prompts) == list(TEXTS)
    assert [cfg.default_caption, cfg.caption, cfg.word, cfg.subject, cfg.style, cfg.model.vae] == list(TEXTS[:6])
