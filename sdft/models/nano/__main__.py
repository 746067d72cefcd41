"""Pack the trained parts of nano into the package and measure what is shipped: `python -m sdft.models.nano`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from transformers import CLIPModel

from sdft.config.command import build, command
from sdft.data.sources import ToyWorld
from sdft.data.toy.lexicon import VOCABULARY
from sdft.data.toy.rich_lexicon import RICH_SUBJECTS, RICH_VOCABULARY
from sdft.data.toy.scenes import SUBJECTS
from sdft.errors import UserError
from sdft.evaluation.clip_judge import load_judge
from sdft.evaluation.image_grid import save_grid
from sdft.formats.diffusers_folder import write_folder
from sdft.formats.run_folder import BEFORE_AFTER, read_summary
from sdft.hardware import autocast_precision, default_precision
from sdft.models.load import pretrained
from sdft.models.nano.build import tokenizer
from sdft.models.sdxl import SDXL
from sdft.sampling.generate import generate
from sdft.sampling.samplers import Sampler

NUM_SHOWN = 24
WORLDS = {"simple": (SUBJECTS, VOCABULARY), "rich": (RICH_SUBJECTS, RICH_VOCABULARY)}
"""Kind of scenes -> its subjects and its words."""
COMMANDS = {"simple": "nano", "rich": "nano-128"}
"""Kind of scenes -> what `make` is told."""


@command("nano")
def main(cfg: DictConfig) -> None:
    """Write the weights in fp16, evaluate them as shipped, and write the model card."""
    out = Path(cfg.out)
    for key in ("base", "clip"):
        if not Path(cfg[key], "model").is_dir():
            raise UserError(f"{key}={cfg[key]}: no trained model there; `make nano` trains it")
    weights = out / "weights"
    write_folder(pretrained(str(Path(cfg.base, "model"))), weights, torch.float16)
    write_folder(CLIPModel.from_pretrained(Path(cfg.clip, "model")), weights / "clip", torch.float16)
    tokenizer(WORLDS[cfg.scenes][1], "<|endoftext|>").save_pretrained(weights / "clip")

    model = pretrained(str(weights))
    metrics = build(cfg.autoencoder)(model.vae, contextlib.nullcontext, out)
    (out / BEFORE_AFTER).rename(out / "vae.png")
    metrics |= build(cfg.judge)(CLIPModel.from_pretrained(weights / "clip"), contextlib.nullcontext, out)
    metrics |= recognised(model, build(cfg.sampler), out, cfg)
    metrics["megabytes"] = sum(file.stat().st_size for file in weights.rglob("*") if file.is_file()) / 1e6
    (out / "MODEL_CARD.md").write_text(card(metrics, training(cfg), cfg), encoding="utf-8")
    for name, value in metrics.items():
        print(f"  {name:22} {value:.3f}")


def recognised(model: SDXL, sampler: Sampler, out: Path, cfg: DictConfig) -> dict[str, float]:
    """The share of images of held-out prompts whose subject the judge recognises, and, of two subjects, both; writes
    `samples.png`."""
    world = ToyWorld(["plain"], cfg.num_images, "test", scenes=cfg.scenes)
    scenes = [world.scene(index) for index in range(cfg.num_images)]
    precision = autocast_precision(default_precision(on_gpu=False))
    size = (cfg.size, cfg.size)
    prompts = [scene.caption for scene in scenes]
    pictures = generate(model, prompts, range(len(scenes)), sampler, size, precision, progress="pictures")
    rows = [pictures[first : first + 8] for first in range(0, min(NUM_SHOWN, len(pictures)), 8)]
    save_grid(out / "samples.png", [np.asarray(row) for row in rows])
    judge = load_judge(str(out / "weights" / "clip"), WORLDS[cfg.scenes][0])
    single = [place for place, scene in enumerate(scenes) if scene.other is None]
    subjects = [scenes[place].subject for place in single]
    found = {"recognised": judge.subject_accuracy(np.asarray(pictures)[single], subjects)}
    paired = [place for place, scene in enumerate(scenes) if scene.other is not None]
    if paired:
        pairs = [(scene.subject, scene.other.subject) for scene in scenes if scene.other is not None]
        both = judge.both_hits(np.asarray(pictures)[paired], pairs)
        found["both_recognised"] = both.float().mean().item()
    return found


def training(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """The summaries of the runs that exist."""
    found = {name: read_summary(Path(cfg[name])) for name in ("vae", "base", "clip")}
    return {name: summary for name, summary in found.items() if summary is not None}


def card(metrics: dict[str, float], runs: dict[str, dict[str, Any]], cfg: DictConfig) -> str:
    """The model card."""
    trained = "\n".join(
        f"| {name} | `experiment={run['name']}` | {run['num_trained_parameters'] / 1e6:.2f} M | "
        f"{run['num_steps']:,} | {run['train_seconds'] / 60:.0f} |"
        for name, run in runs.items()
    )
    looks = [name.removeprefix("psnr_") for name in metrics if name.startswith("psnr_")]
    by_look = "\n".join(
        f"| {x} | {metrics[f'psnr_{x}']:.1f} | {metrics[f'patch_error_{x}']:.3f} | {metrics[f'accuracy_{x}']:.1%} |"
        for x in looks
    )
    num_words = sum(word.isalpha() for word in WORLDS[cfg.scenes][1])
    pairs = ""
    if "both_recognised" in metrics:
        pairs = (
            f"\n- of two subjects, it recognises both in **{metrics['both_recognised']:.1%}** of such images, and "
            f"names both in **{metrics['both_named']:.1%}** of held-out scenes;"
        )
    return f"""# nano

A small model with SDXL's architecture, classes and keys, for images of {cfg.size} x {cfg.size} pixels of procedural
scenes. With it, everything in this project runs on a laptop without downloads. It generates only images of these
scenes.

![Images of held-out prompts](samples.png)

Trained by `make {COMMANDS[cfg.scenes]}` from random weights. Data: the toy world of `sdft/data/toy`, training split,
generated during training; the UNet and the text encoders were trained on the plain look only, the VAE and the judge on
all. Licence: Apache-2.0.

| part | trained by | trained parameters | steps | minutes |
|---|---|---|---|---|
{trained}

Measured on the shipped fp16 weights ({metrics["megabytes"]:.1f} MB in all), on scenes of the test split:

- the judge recognises the subject in **{metrics["recognised"]:.1%}** of images of {cfg.num_images} held-out prompts
  (25 Euler steps, CFG 5);{pairs}
- the accuracy of the judge is **{metrics["accuracy"]:.1%}** on held-out scenes; its probabilities are off by
  {metrics["calibration"]:.3f} (expected calibration error).

| look | VAE, mean PSNR in dB | VAE, mean error of patches (1 - SSIM) | judge |
|---|---|---|---|
{by_look}

Known limits: a vocabulary of {num_words} English words, {cfg.size} pixels. Other words have no meaning to it.
"""


if __name__ == "__main__":
    main()
