"""Work on data from the command line: `python -m sdft.data toy out=DIR look=dreamy count=200`."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig
from PIL import Image
from tqdm import tqdm

from sdft.config import verb
from sdft.data.sources import ToyWorld
from sdft.types import UserError


@verb("data_toy")
def toy(cfg: DictConfig) -> None:
    """Write toy scenes as PNG files with their captions beside them."""
    out = Path(cfg.out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"out={out}: the folder is not empty; name a new one")
    out.mkdir(parents=True, exist_ok=True)
    world = ToyWorld([cfg.look], cfg.count, cfg.split, cfg.caption, cfg.size)
    for index in tqdm(range(cfg.count), unit="image"):
        sample = world[index]
        Image.fromarray(sample.image_HWC).save(out / f"{index:05d}.png")
        (out / f"{index:05d}.txt").write_text(sample.caption + "\n", encoding="utf-8")
    print(f"{cfg.count} pictures in {out}")


COMMANDS = {"toy": toy}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"error: name one of: {', '.join(COMMANDS)}, as in python -m sdft.data toy out=DIR", file=sys.stderr)
        raise SystemExit(2)
    COMMANDS[sys.argv.pop(1)]()
