"""Pack the trained parts of nano into the package and measure what is shipped: `python -m sdft.models.nano`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from sdft.config.command import build, command
from sdft.data.sources import ToyWorld
from sdft.data.toy.lexicon import SUBJECTS, VOCABULARY
from sdft.errors import UserError
from sdft.evaluation.clip_judge import load_clip, load_judge, with_article
from sdft.evaluation.image_grid import save_grid
from sdft.formats.diffusers_folder import write_folder
from sdft.formats.run_folder import BEFORE_AFTER, read_summary
from sdft.hardware import autocast_precision, default_precision
from sdft.models.load import pretrained
from sdft.models.nano.build import tokenizer
from sdft.models.sdxl import SDXL
from sdft.sampling.generate import generate
from sdft.sampling.samplers import Sampler

PER_ROW = 10
NUM_SHOWN = 3 * PER_ROW
JUDGES = ("clip", "clip_watching")
EARLIER: dict[str, Any] = {
    "recognised": "92.0%",
    "accuracy": "97.0%",
    "plain": ("38.4", "96.8%"),
    "photo": ("31.2", "96.0%"),
    "dreamy": ("31.8", "97.2%"),
    "technomant": ("31.7", "98.0%"),
}
"""What the card of the nano of 64 px said: of 23 subjects, one in a scene, in four looks; of 200 prompts."""


@command("nano")
def main(cfg: DictConfig) -> None:
    """Write the weights in fp16, evaluate them as shipped, and write the model card."""
    out = Path(cfg.out)
    for key in ("base", *JUDGES):
        if not Path(cfg[key], "model").is_dir():
            raise UserError(f"{key}={cfg[key]}: no trained model there; `make nano` trains it")
    weights = out / "weights"
    write_folder(pretrained(str(Path(cfg.base, "model"))), weights, torch.float16)
    for name in JUDGES:
        write_folder(load_clip(Path(cfg[name], "model")), weights / name, torch.float16)
        tokenizer(VOCABULARY, "<|endoftext|>").save_pretrained(weights / name)

    model = pretrained(str(weights))
    metrics = build(cfg.autoencoder)(model.vae, contextlib.nullcontext, out)
    (out / BEFORE_AFTER).rename(out / "vae.png")
    for name in JUDGES:
        found = build(cfg.judge)(load_clip(weights / name), contextlib.nullcontext, out)
        metrics |= {f"{name}/{key}": value for key, value in found.items()}
    metrics |= recognised(model, build(cfg.sampler), out, cfg)
    metrics["megabytes"] = sum(file.stat().st_size for file in weights.rglob("*") if file.is_file()) / 1e6
    (out / "MODEL_CARD.md").write_text(card(metrics, training(cfg), cfg), encoding="utf-8")
    for name, value in metrics.items():
        print(f"  {name:22} {value:.3f}")


def recognised(model: SDXL, sampler: Sampler, out: Path, cfg: DictConfig) -> dict[str, float]:
    """The share of images of held-out prompts whose subject each judge recognises, and, of two subjects, both.

    Writes `samples.png`: one image of each subject, and below them some of the held-out prompts.
    """
    world = ToyWorld(["plain"], cfg.num_images, "test")
    scenes = [world.scene(index) for index in range(cfg.num_images)]
    precision = autocast_precision(default_precision(on_gpu=False))
    size = (cfg.size, cfg.size)
    of_each = [f"a photo of {with_article(subject)}" for subject in SUBJECTS]
    prompts = [*of_each, *(scene.caption for scene in scenes)]
    seeds = [*range(len(of_each)), *range(len(scenes))]
    drawn = generate(model, prompts, seeds, sampler, size, precision, progress="pictures")
    shown = drawn[: len(of_each) + NUM_SHOWN]
    rows = [np.asarray(shown[first : first + PER_ROW]) for first in range(0, len(shown), PER_ROW)]
    save_grid(out / "samples.png", rows)
    pictures = drawn[len(of_each) :]
    paired_N = np.array([scene.other is not None for scene in scenes])
    found: dict[str, float] = {}
    for name in JUDGES:
        judge = load_judge(str(out / "weights" / name), SUBJECTS)
        hits_N = judge.named_hits(pictures, [scene.subjects for scene in scenes]).numpy()
        found |= {f"{name}/recognised": hits_N[~paired_N].mean(), f"{name}/both_recognised": hits_N[paired_N].mean()}
    return found


def training(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """The summaries of the runs that exist."""
    found = {name: read_summary(Path(cfg[name])) for name in ("vae", "base", *JUDGES)}
    return {name: summary for name, summary in found.items() if summary is not None}


def card(metrics: dict[str, float], runs: dict[str, dict[str, Any]], cfg: DictConfig) -> str:
    """The model card."""
    num_words = sum(word.isalpha() for word in VOCABULARY)
    return f"""# nano

A small model with SDXL's architecture, classes and keys, for images of {cfg.size} x {cfg.size} pixels of procedural
scenes. With it, everything in this project runs on a laptop without downloads. It generates only images of these
scenes.

![An image of each subject, and below them images of held-out prompts](samples.png)

Trained by `make nano` from random weights. Data: the toy world of `sdft/data/toy`, training split, generated during
training; the UNet and the text encoders were trained on the plain look only, the VAE and the judges on all. One judge
(`clip`) measures; by the other (`clip_watching`), of another size and seed, runs are watched and checkpoints
chosen. Licence: Apache-2.0.

| part | trained by | trained parameters | steps | minutes |
|---|---|---|---|---|
{_trained(runs)}

Measured on the shipped fp16 weights ({metrics["megabytes"]:.1f} MB in all), on scenes of the test split, and on images
of {cfg.num_images} prompts of that split (25 Euler steps, CFG 5):

| of the judge | measures | watches | nano of 64 px |
|---|---|---|---|
{_by_judge(metrics)}

| look | VAE: PSNR in dB | 1 - SSIM of patches | subjects named | by the other judge | nano of 64 px: PSNR | named |
|---|---|---|---|---|---|---|
{_by_look(metrics)}

The last columns are of the nano before this one, whose scenes of 64 px showed one of 23 subjects without details, in
four looks.

Known limits: a vocabulary of {num_words} English words, {cfg.size} pixels. Other words have no meaning to it.
"""


def _trained(runs: dict[str, dict[str, Any]]) -> str:
    return _rows(
        (
            name,
            f"`experiment={run['name']}`",
            f"{run['num_trained_parameters'] / 1e6:.2f} M",
            f"{run['num_steps']:,}",
            f"{run['train_seconds'] / 60:.0f}",
        )
        for name, run in runs.items()
    )


def _by_look(metrics: dict[str, float]) -> str:
    looks = [name.removeprefix("psnr_") for name in metrics if name.startswith("psnr_")]
    return _rows(
        [look, f"{metrics[f'psnr_{look}']:.1f}", f"{metrics[f'patch_error_{look}']:.3f}"]
        + [f"{metrics[f'{name}/accuracy_{look}']:.1%}" for name in JUDGES]
        + [*EARLIER.get(look, ("", ""))]
        for look in looks
    )


def _by_judge(metrics: dict[str, float]) -> str:
    return _rows(
        [words, *(form.format(metrics[f"{name}/{key}"]) for name in JUDGES), EARLIER.get(key, "")]
        for words, key, form in (
            ("images of held-out prompts whose subject it recognises", "recognised", "{:.1%}"),
            ("of those with two subjects, both", "both_recognised", "{:.1%}"),
            ("held-out scenes whose subject it names", "accuracy", "{:.1%}"),
            ("of those with two subjects, both", "both_named", "{:.1%}"),
            ("expected calibration error of its probabilities", "calibration", "{:.3f}"),
        )
    )


def _rows(rows: Iterable[Sequence[str]]) -> str:
    """The rows of a table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    main()
