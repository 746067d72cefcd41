"""Choose: `python -m sdft.choosing run=RUN_FOLDER`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from sdft.board.run_page import PAGE, write_run_page
from sdft.choosing.run import choose
from sdft.config.command import command


@command("choose")
def main(cfg: DictConfig) -> None:
    """Measure, and write the recommended weights into the run folder."""
    choose(cfg, print)
    if (run := Path(cfg.run).expanduser() / PAGE).is_file():
        write_run_page(run.parent)


if __name__ == "__main__":
    main()
