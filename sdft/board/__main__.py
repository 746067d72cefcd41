"""Write the page of a run or of many: `python -m sdft.board RUN_FOLDER` or `python -m sdft.board runs`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from sdft.board.history import History, read_history
from sdft.board.run_page import write_forecast, write_run_page
from sdft.board.runs_page import MARKS, runs_in, write_runs_page
from sdft.config.command import command, quoted
from sdft.config.trust import as_packages
from sdft.distributed.run_lock import refuse_if_locked
from sdft.errors import UserError

KILLED = "The process ended without a word: it was killed, or the machine was stopped"


@command("board")
def board(cfg: DictConfig) -> None:
    """Write the page, and print its path."""
    folder = Path(str(cfg["in"])).expanduser()
    if not isinstance(cfg.forecast, bool):
        raise UserError(f"forecast={cfg.forecast}: must be true or false")
    if not folder.is_dir():
        raise UserError(
            f"in={cfg['in']}: there is no such folder; name a run folder, or a folder with run folders in it"
        )
    if any((folder / name).is_file() for name in MARKS):
        note_death(folder)
        if cfg.forecast:
            write_forecast(folder, forecast_of(folder, cfg.trust))
        print(f"next: open {write_run_page(folder)}")
        return
    runs = list(runs_in(folder))
    if not runs:
        raise UserError(f"in={cfg['in']}: there is no run in it; name a run folder, or a folder with run folders in it")
    for run in runs:
        note_death(run)
    print(f"next: open {write_runs_page(folder, runs)}, {len(runs)} run{'' if len(runs) == 1 else 's'}")


def note_death(run: Path) -> None:
    """Record that a run ended, if its history does not say so and no process has its folder."""
    record = read_history(run)
    if not record.start or record.end:
        return
    try:
        refuse_if_locked(run)
    except UserError:
        return
    if (run / ".lock").is_file():  # which its own end would have removed
        History(run).end("stopped", KILLED, record.updated)
        write_run_page(run)


def forecast_of(run: Path, trust: Sequence[str]) -> dict[str, float]:
    """Memory and time of a run, by its config, in which nothing may run code."""
    from sdft.evaluation.run import config_of
    from sdft.planning.dry_run import forecast_figures

    return forecast_figures(config_of(run, as_packages(trust)))


def main() -> None:
    """A word that is no setting and belongs to no flag is the folder."""
    words = sys.argv[1:]
    for place, word in enumerate(words):
        if "=" not in word and not word.startswith("-") and not (place and words[place - 1].startswith("--")):
            sys.argv[place + 1] = f"in={quoted(word)}"
    board()


if __name__ == "__main__":
    main()
