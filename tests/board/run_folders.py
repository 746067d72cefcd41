"""Run folders as training leaves them, made by hand."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdft.board.history import History

ALERT = """</script><script>alert(1)</script> it's "quoted" <!-- <img src=x onerror=alert(2)>"""
RESUME = "python train.py experiment=dreamy_style resume=auto"


def draw(path: Path, colour: tuple[int, int, int], side: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), colour).save(path)


def noise(path: Path, seed: int, side: int = 64) -> None:
    """The picture that takes most bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_history(
    run: Path, steps: int, until: int | None = None, every: int = 10, began: float | None = None
) -> History:
    """A run of `steps` steps of a tenth of a second, of which `until` are done."""
    history, until = History(run), steps if until is None else until
    at = time.time() - until / 10 if began is None else began
    lines: list[dict[str, Any]] = [
        {"time": at, "event": "start", "step": 0, "max_steps": steps, "resume": RESUME, "device": "cpu",
         "lines": ["  left out: 3.png (broken)", "  trains unet: 1 of 2 parameters"]}
    ]  # fmt: skip
    for step in range(every, until + 1, every):
        values = {"train/loss": math.exp(-step / steps) + 0.1 * math.sin(step), "rate/unet": 1e-3, "memory/most": 1.5,
                  "memory/now": 1.2, "speed/seconds": 0.1, "train/gradient_norm": 0.4, "watch/adherence": 0.9,
                  **{f"timestep/{200 * i}": 1 / (i + 1) for i in range(5)}}  # fmt: skip
        values |= {"val/eps_mse": 0.1} if step % (10 * every) == 0 else {}
        lines.append({"time": at + step / 10, "step": step, "values": values})
    run.mkdir(parents=True, exist_ok=True)
    history.file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return history


def write_run(run: Path, prompts: list[str], shown: list[int], picture: Any = draw, **settings: Any) -> None:
    """Previews, training pictures and receipt. shown: the steps of the previews."""
    for number, _ in enumerate(prompts):
        for step in (None, *shown):
            name = "base" if step is None else f"step_{step:06d}"
            look = (200, 30, 30) if step is None else (30, 30 + step % 200, 160)
            picture(run / "previews" / name / f"{number:02d}.png", look if picture is draw else number)
    told = [{"prompt": prompt, "seed": seed, "size": [64, 64]} for seed, prompt in enumerate(prompts)]
    (run / "previews" / "prompts.json").write_text(json.dumps(told))
    config = {"name": run.name, "rank": 4, "optimizer": {"lr": 1e-3}, **settings}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    (run / "receipt.json").write_text(json.dumps({"config": config, "overrides": overrides}))


def finish(run: Path, history: History, steps: int, **figures: float) -> None:
    """What a run writes at its end."""
    draw(run / "before_after.png", (90, 90, 90), 300)
    (run / "lora.safetensors").write_bytes(b"x" * 1000)
    summary = {"name": run.name, "num_steps": steps, "train_seconds": 40.0, "artifacts": {}, **figures}
    (run / "summary.json").write_text(json.dumps(summary))
    history.trained(steps)
    history.end("finished")
