"""Merge two models: `python -m sdft.merging a=nano b=runs/dreamy_full/.../model alpha=0.4 out=runs/merged`."""

from __future__ import annotations

import shlex

from hydra.utils import instantiate
from omegaconf import DictConfig

from sdft.config import verb


@verb("merge")
def main(cfg: DictConfig) -> None:
    """Merge, and say where the result lies and how to look at it."""
    merge = instantiate(cfg)
    out = merge()
    print(f"{out}: {1 - cfg.alpha:g} x {cfg.a} + {cfg.alpha:g} x {cfg.b}")
    subjects = shlex.quote(f"subjects={{a: '{cfg.a}', b: '{cfg.b}', merged: '{out}'}}")
    print(f"next: look at it with python eval.py {subjects}")


if __name__ == "__main__":
    main()
