"""A report of 2,000 pictures: how long it takes to write, how large it is, how long a browser takes to open it.

    python -m benchmarks.page          # needs Debian's chromium

Opened from disk in headless Chromium, each time in a fresh profile, until the pictures in view are decoded and painted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from sdft.data.toy.rendering import LOOKS, render
from sdft.data.toy.stories import sample_scene
from sdft.evaluation.page.write import write_page
from sdft.evaluation.results import Estimate, ImageResult, MetricInfo, Results, SubjectSummary

PROMPTS, SEEDS, OPENINGS = 50, 10, 5
DISTINCT = 40
"""Files for all pictures: each is still read, reduced and embedded again."""

PAINTED = """async () => {
  const seen = [...document.querySelectorAll(".picture img[src]")];
  await Promise.all(seen.map((image) => image.decode()));
  await new Promise(requestAnimationFrame);
  return [performance.now() / 1000, seen.length];
}"""


def drawn(number: int, side: int) -> np.ndarray:
    """As nano draws, or noise with the spectrum of a photo, amplitude 1 / f."""
    if side == 64:
        return render(sample_scene(0, number), list(LOOKS)[number % len(LOOKS)])
    white = np.random.default_rng(number).normal(size=(side, side, 3))
    f = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
    smooth = np.fft.ifft2(np.fft.fft2(white, axes=(0, 1)) / np.maximum(f, 1 / side)[..., None], axes=(0, 1)).real
    return np.clip(128 + 50 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def results(folder: Path, side: int) -> Results:
    """Four subjects, 50 prompts, 10 seeds."""
    for number in range(DISTINCT):
        Image.fromarray(drawn(number, side)).save(folder / f"{number}.png")
    names, prompts = ("base", "dreamy", "photo", "blend"), [f"a picture of the thing {n}" for n in range(PROMPTS)]
    pictures = []
    for number, (name, prompt, seed) in enumerate(product(names, prompts, range(SEEDS))):
        settings = {"prompt": prompt, "seed": seed, "sampler": "dpm++ 2m", "steps": 20, "cfg": 5.0, "size": side}
        path = f"{number % DISTINCT}.png"
        pictures.append(ImageResult(name, {"prompt": prompt, "seed": seed}, path, settings, {"adherence": 0.3}))
    metric = MetricInfo("adherence", "adherence", "higher", "How well a picture fits its prompt.")
    figures = {name: {"adherence": Estimate(0.3, 0.29, 0.31)} for name in names}
    axes = {"prompt": prompts, "seed": range(SEEDS)}
    return Results("many", {}, axes, [SubjectSummary(n, "lora", n) for n in names], [metric], pictures, figures)


def seconds_to_open(browser: Browser, page: Path) -> tuple[float, int]:
    """From the start of the navigation, and how many pictures are in view."""
    opened = browser.new_page(viewport={"width": 1360, "height": 900})
    opened.goto(page.as_uri())
    opened.wait_for_selector(".picture img[src]")
    seconds, seen = opened.evaluate(PAINTED)
    opened.close()
    return seconds, seen


def main() -> None:
    print("| pictures | side | written in s | MB | opened in s, median (worst) | in view |")
    print("|---|---|---|---|---|---|")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for side in (64, 512):
            with tempfile.TemporaryDirectory() as folder:
                page, found = Path(folder, "report.html"), results(Path(folder), side)
                start = time.perf_counter()
                write_page(page, found)
                written = time.perf_counter() - start
                times, seen = zip(*(seconds_to_open(browser, page) for _ in range(OPENINGS)), strict=True)
                opened = f"{statistics.median(times):.2f} ({max(times):.2f})"
                size = page.stat().st_size / 1e6
                print(f"| {len(found.pictures)} | {side} | {written:.1f} | {size:.1f} | {opened} | {seen[0]} |")
        browser.close()


if __name__ == "__main__":
    main()
