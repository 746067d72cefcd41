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
from sdft.data.toy.scenes import SUBJECTS
from sdft.errors import UserError
from sdft.evaluation.after_training import BEFORE_AFTER
from sdft.evaluation.clip_judge import load_judge
from sdft.evaluation.image_grid import save_grid
from sdft.formats.diffusers_folder import write_folder
from sdft.formats.run_folder import read_summary
from sdft.hardware import autocast_precision, default_precision
from sdft.models.load import pretrained
from sdft.models.nano.build import tokenizer
from sdft.models.sdxl import SDXL
from sdft.sampling.generate import generate
from sdft.sampling.samplers import Sampler

NUM_SHOWN = 24


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
    tokenizer(VOCABULARY, "<|endoftext|>").save_pretrained(weights / "clip")

    model = pretrained(str(weights))
    figures = build(cfg.autoencoder)(model.vae, contextlib.nullcontext, out)
    (out / BEFORE_AFTER).rename(out / "vae.png")
    figures |= build(cfg.judge)(CLIPModel.from_pretrained(weights / "clip"), contextlib.nullcontext, out)
    figures["recognised"] = recognised(model, build(cfg.sampler), weights, out, cfg.num_images, cfg.size)
    figures["megabytes"] = sum(file.stat().st_size for file in weights.rglob("*") if file.is_file()) / 1e6
    (out / "MODEL_CARD.md").write_text(card(figures, training(cfg), cfg.num_images), encoding="utf-8")
    for name, value in figures.items():
        print(f"  {name:22} {value:.3f}")


def recognised(model: SDXL, sampler: Sampler, weights: Path, out: Path, num_images: int, size: int) -> float:
    """The share of images of held-out prompts whose subject the judge names; writes `samples.png`."""
    scenes = ToyWorld(["plain"], num_images, "test")
    prompts = [scenes.scene(index).caption for index in range(num_images)]
    precision = autocast_precision(default_precision(on_gpu=False))
    pictures = generate(model, prompts, range(num_images), sampler, (size, size), precision, progress="pictures")
    rows = [pictures[first : first + 8] for first in range(0, NUM_SHOWN, 8)]
    save_grid(out / "samples.png", [np.asarray(row) for row in rows])
    judge = load_judge(str(weights / "clip"), SUBJECTS)
    return judge.subject_accuracy(pictures, [scenes.scene(index).subject for index in range(num_images)])


def training(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """The summaries of the runs, where they are there."""
    found = {name: read_summary(Path(cfg[name])) for name in ("vae", "base", "clip")}
    return {name: summary for name, summary in found.items() if summary is not None}


def card(figures: dict[str, float], runs: dict[str, dict[str, Any]], num_images: int) -> str:
    """The model card."""
    trained = "\n".join(
        f"| {name} | `experiment=nano_{name}` | {run['num_trained_parameters'] / 1e6:.2f} M | {run['num_steps']:,} | "
        f"{run['train_seconds'] / 60:.0f} |"
        for name, run in runs.items()
    )
    looks = ("plain", "photo", "dreamy", "technomant")
    by_look = "\n".join(f"| {x} | {figures[f'psnr_{x}']:.1f} | {figures[f'accuracy_{x}']:.1%} |" for x in looks)
    return f"""# nano

SDXL's architecture in small, with the same classes and keys, for pictures of 64 x 64 pixels of one procedural world.
It exists so that everything in this project runs on a laptop with no download. It draws nothing but that world.

![Pictures of held-out prompts](samples.png)

Made by `make nano`, from nothing, on two CPU cores. Data: the toy world of `sdft/data/toy`, training split, drawn on
the fly; the UNet and its encoders saw only the plain look, the VAE and the judge all four. Licence: Apache-2.0.

| part | made by | learned | steps | minutes |
|---|---|---|---|---|
{trained}

Measured on the shipped fp16 weights ({figures["megabytes"]:.1f} MB in all), on scenes of the test split:

- the judge recognises the subject in **{figures["recognised"]:.1%}** of {num_images} pictures of held-out prompts
  (25 Euler steps, CFG 5);
- the judge itself is right on **{figures["accuracy"]:.1%}** of held-out renderings.

| look | VAE, mean PSNR in dB | judge |
|---|---|---|
{by_look}

Known limits: 82 words of English, one subject a picture, 64 pixels. Text outside its vocabulary reads as noise.
"""


if __name__ == "__main__":
    main()
