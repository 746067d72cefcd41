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
    metrics = build(cfg.autoencoder)(model.vae, contextlib.nullcontext, out)
    (out / BEFORE_AFTER).rename(out / "vae.png")
    metrics |= build(cfg.judge)(CLIPModel.from_pretrained(weights / "clip"), contextlib.nullcontext, out)
    metrics["recognised"] = recognised(model, build(cfg.sampler), weights, out, cfg.num_images, cfg.size)
    metrics["megabytes"] = sum(file.stat().st_size for file in weights.rglob("*") if file.is_file()) / 1e6
    (out / "MODEL_CARD.md").write_text(card(metrics, training(cfg), cfg.num_images), encoding="utf-8")
    for name, value in metrics.items():
        print(f"  {name:22} {value:.3f}")


def recognised(model: SDXL, sampler: Sampler, weights: Path, out: Path, num_images: int, size: int) -> float:
    """The fraction of images of held-out prompts whose subject the judge recognises; writes `samples.png`."""
    scenes = ToyWorld(["plain"], num_images, "test")
    prompts = [scenes.scene(index).caption for index in range(num_images)]
    precision = autocast_precision(default_precision(on_gpu=False))
    pictures = generate(model, prompts, range(num_images), sampler, (size, size), precision, progress="pictures")
    rows = [pictures[first : first + 8] for first in range(0, NUM_SHOWN, 8)]
    save_grid(out / "samples.png", [np.asarray(row) for row in rows])
    judge = load_judge(str(weights / "clip"), SUBJECTS)
    return judge.subject_accuracy(pictures, [scenes.scene(index).subject for index in range(num_images)])


def training(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """The summaries of the runs that exist."""
    found = {name: read_summary(Path(cfg[name])) for name in ("vae", "base", "clip")}
    return {name: summary for name, summary in found.items() if summary is not None}


def card(metrics: dict[str, float], runs: dict[str, dict[str, Any]], num_images: int) -> str:
    """The model card."""
    trained = "\n".join(
        f"| {name} | `experiment=nano_{name}` | {run['num_trained_parameters'] / 1e6:.2f} M | {run['num_steps']:,} | "
        f"{run['train_seconds'] / 60:.0f} |"
        for name, run in runs.items()
    )
    looks = ("plain", "photo", "dreamy", "technomant")
    by_look = "\n".join(f"| {x} | {metrics[f'psnr_{x}']:.1f} | {metrics[f'accuracy_{x}']:.1%} |" for x in looks)
    return f"""# nano

A small model with SDXL's architecture, classes and keys, for images of 64 x 64 pixels of procedural scenes. With it,
everything in this project runs on a laptop without downloads. It generates only images of these scenes.

![Images of held-out prompts](samples.png)

Trained by `make nano` from random weights, on two CPU cores. Data: the toy world of `sdft/data/toy`, training split,
generated during training; the UNet and the text encoders were trained on the plain look only, the VAE and the judge on
all four. Licence: Apache-2.0.

| part | trained by | trained parameters | steps | minutes |
|---|---|---|---|---|
{trained}

Measured on the shipped fp16 weights ({metrics["megabytes"]:.1f} MB in all), on scenes of the test split:

- the judge recognises the subject in **{metrics["recognised"]:.1%}** of {num_images} images of held-out prompts
  (25 Euler steps, CFG 5);
- the accuracy of the judge is **{metrics["accuracy"]:.1%}** on held-out scenes.

| look | VAE, mean PSNR in dB | judge |
|---|---|---|
{by_look}

Known limits: a vocabulary of 82 English words, one subject per image, 64 pixels. Other words have no meaning to it.
"""


if __name__ == "__main__":
    main()
