"""Merge: `python -m sdft.merging a=nano b=runs/photo/model alpha=0.4 out=runs/blend`; `merge=` chooses the method."""

from __future__ import annotations

from omegaconf import DictConfig

from sdft.config.command import command
from sdft.merging.run import merge


@command("merge")
def main(cfg: DictConfig) -> None:
    """Merge, and print the path of the result and the command that compares it with the inputs."""
    merge(cfg, print)


if __name__ == "__main__":
    main()
