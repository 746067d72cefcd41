"""Draw an image strip of the interpolation of two models: `python -m sdft.merging.strip a=runs/dreamy b=runs/photo`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from sdft.config.command import build, command
from sdft.evaluation.image_grid import save_grid

STRIP = "strip.png"


@command("strip")
def main(cfg: DictConfig) -> None:
    """One row of images for each prompt, one column for each model from a to b, all from the same noise."""
    interpolate, load, draw = build(cfg.interpolation), build(cfg.model), build(cfg.draw)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names, columns = [], []
    for name, path in interpolate():
        model = load(weights=path).to(device).eval()
        precision = "bf16" if device.type == "cuda" else "fp32"
        columns.append(draw(model, seeds=range(len(cfg.prompts)), precision=precision, progress=name))
        names.append(name)
        print(f"  {name:8} {path}", flush=True)
    strip = Path(cfg.out) / STRIP
    save_grid(strip, list(np.stack(columns, axis=1)), list(cfg.prompts), names)
    print(f"  strip {strip}\nnext: choose a model and continue training from it with model.weights=FOLDER")


if __name__ == "__main__":
    main()
