"""Masked training on nano: is the look learned inside of the masks, and does the rest keep the look of the base?

    python -m benchmarks.masked [OVERRIDE ...]

48 dreamy pictures whose masks are their subjects. The style gain of 64 held-out prompts is measured on the middle of
the pictures, where subjects are, and on their upper third, where none is. `objective/prior=null` shows training without
the prior. Takes about five minutes on two cores; masked.png shows the base above the trained model.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from sdft.config.command import build, compose
from sdft.data.sources.toy import ToyWorld
from sdft.data.toy.layout import lay_out
from sdft.data.toy.palettes import natural_palette
from sdft.data.toy.rasterize import stage
from sdft.evaluation.style_gain import StyleGainMetric
from sdft.evaluation.subject_loader import with_lora
from sdft.sampling.generate import generate

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ["experiment=dreamy_style", "data=folder", "data.masks=true", "objective/prior=outside"]
SHORT = ["verdict=none", "logger=csv", "~callbacks.previews"]
NUM_IMAGES = 64
PLACES = {"middle": np.s_[:, 16:56, 12:52], "upper third": np.s_[:, :20]}


def write_pictures(folder: Path) -> None:
    """Dreamy pictures with captions, and masks of what they show."""
    world = ToyWorld(["dreamy"], 48, "train")
    for index in range(len(world.keys)):
        sample, scene = world[index], world.scene(index)
        mask = stage(lay_out(scene), natural_palette(scene), len(sample.image_HWC)).mask
        Image.fromarray(sample.image_HWC).save(folder / f"{index:02}.png")
        Image.fromarray((mask * 255).astype(np.uint8)).save(folder / f"{index:02}.mask.png")
        (folder / f"{index:02}.txt").write_text(sample.caption, encoding="utf-8")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, run = Path(name) / "pictures", Path(name) / "run"
        folder.mkdir()
        write_pictures(folder)
        words = [*TRAIN, *SHORT, f"data.root={folder}", f"run_dir={run}", *sys.argv[1:]]
        subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True)
        cfg = compose("train", ["experiment=dreamy_style"])
        model, sampler = build(cfg.model), build(cfg.sampler)
        reference = ToyWorld(["dreamy"], 128, "test")
        prompts = [reference[index].caption for index in range(NUM_IMAGES)]
        before = generate(model, prompts, range(NUM_IMAGES), sampler, (64, 64), progress="base")
        with with_lora(model, run / "lora.safetensors"):
            tuned = generate(model, prompts, range(NUM_IMAGES), sampler, (64, 64), progress="tuned")
    looks = np.stack([reference[index].image_HWC for index in range(len(reference.keys))])
    for place, where in PLACES.items():
        side = min(before[where].shape[1:3])
        gain = StyleGainMetric(before[where], looks[where], side=side)(tuned[where])
        print(f"{place:12} style gain {gain.style_gain:.3f}")
    rows = [np.concatenate(list(images[:10]), axis=1) for images in (before, tuned)]
    Image.fromarray(np.concatenate(rows)).resize((1280, 256), Image.Resampling.NEAREST).save("masked.png")


if __name__ == "__main__":
    main()
