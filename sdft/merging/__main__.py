"""Merge two models: `python -m sdft.merging a=nano b=runs/dreamy_full/.../model alpha=0.4 out=runs/merged`."""

from __future__ import annotations

import json
import re
import shlex

from omegaconf import DictConfig

from sdft.config import build, verb


@verb("merge")
def main(cfg: DictConfig) -> None:
    """Merge, and say where the result lies and how to look at it."""
    merge = build(cfg)
    out = merge()
    print(f"{out}: {1 - cfg.alpha:g} x {cfg.a} + {cfg.alpha:g} x {cfg.b}")
    subjects = ", ".join(f"{name}: {plain(path)}" for name, path in (("a", cfg.a), ("b", cfg.b), ("merged", str(out))))
    print(f"next: look at it with python eval.py subjects={shlex.quote(f'{{{subjects}}}')}")


def plain(path: str) -> str:
    """A path as a value on Hydra's command line, quoted where it must be."""
    return path if re.fullmatch(r"[A-Za-z0-9_./+-]+", path) else json.dumps(path, ensure_ascii=False)


if __name__ == "__main__":
    main()
