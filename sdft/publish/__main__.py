"""Publish: `python -m sdft.publish run=RUN_FOLDER to=USER/NAME`."""

from __future__ import annotations

from omegaconf import DictConfig

from sdft.config.command import command
from sdft.publish.run import publish


@command("publish")
def main(cfg: DictConfig) -> None:
    """Write the folder of a model repository, and upload it if a name is given."""
    publish(cfg, print)


if __name__ == "__main__":
    main()
