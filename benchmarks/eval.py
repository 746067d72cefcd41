"""Images per second of a grid of 3 subjects x 12 prompts x 4 seeds, compared with a loop over a diffusers pipeline.

    python -m benchmarks.eval

The same weights, sampler, steps, guidance, size and precision on both sides, by turns subject by subject; loading and
writing PNGs count on both. Nothing is cached between the two.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from sdft.evaluation.grid import Axes, build_grid
from sdft.evaluation.image_cache import ImageCache
from sdft.evaluation.subject_loader import SubjectLoader
from sdft.evaluation.subjects import read_subjects
from sdft.formats.adapter import write_lora
from sdft.models.load import NANO, pretrained
from sdft.sampling.samplers import Sampler
from sdft.tuning.adapter import Adapter

THINGS = ("cat", "dog", "laptop", "cup", "car", "boat", "house", "castle", "tree", "bird", "flower", "fish")
PROMPTS = [f"a photo of a {thing}" for thing in THINGS]
SEEDS, STEPS, CFG, SIZE, BATCH = 4, 4, 5.0, 64, 16


def write_loras(folder: Path) -> dict[str, str]:
    """The base and two LoRAs of rank 8 on the UNet."""
    sources = {"base": "nano"}
    for name in ("one", "two"):
        model = pretrained("nano")
        Adapter(rank=8).attach(model)
        write_lora(model, folder / f"{name}.safetensors")
        sources[name] = str(folder / f"{name}.safetensors")
    return sources


def main() -> None:
    """Both sides, and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        sources = write_loras(Path(folder))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        models = SubjectLoader(lambda weights="nano": pretrained(weights), "nano", device)
        cache = ImageCache(Path(folder) / "ours", models, "fp32", BATCH)
        pipeline, ours, theirs = None, 0.0, 0.0
        for subject in read_subjects(sources):
            begun = time.perf_counter()
            cache.fill(build_grid([subject], PROMPTS, range(SEEDS), Sampler("euler", STEPS, CFG), SIZE, Axes()))
            ours += time.perf_counter() - begun

            begun = time.perf_counter()
            if pipeline is None:
                pipeline = StableDiffusionXLPipeline.from_pretrained(
                    NANO, dtype=torch.float32, add_watermarker=False
                ).to(device)
                pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
                pipeline.set_progress_bar_config(disable=True)
            if subject.loras:
                pipeline.load_lora_weights(subject.source)
            for prompt in PROMPTS:
                for seed in range(SEEDS):
                    picture = pipeline(
                        prompt,
                        num_inference_steps=STEPS,
                        guidance_scale=CFG,
                        height=SIZE,
                        width=SIZE,
                        generator=torch.Generator().manual_seed(seed),
                    ).images[0]
                    picture.save(Path(folder) / f"{subject.name}_{prompt}_{seed}.png")
            if subject.loras:
                pipeline.unload_lora_weights()
            theirs += time.perf_counter() - begun
            print(f"{subject.name}: ours {ours:.1f} s so far, the loop {theirs:.1f} s", flush=True)
    num = len(sources) * len(PROMPTS) * SEEDS
    print(f"{num} pictures, {SIZE} px, {STEPS} steps, batches of {BATCH}, {device}, {torch.get_num_threads()} threads")
    print(f"ours {num / ours:.2f} pictures/s, the loop {num / theirs:.2f}; ratio {theirs / ours:.2f} (goal: 2)")


if __name__ == "__main__":
    main()
