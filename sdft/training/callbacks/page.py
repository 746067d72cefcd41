"""Writes the page of a run, `index.html` in its folder, while it goes on, and the history that the page is made of."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

from sdft.board.history import End, History
from sdft.board.run_page import write_forecast, write_run_page
from sdft.training.callbacks.measured import Measured
from sdft.training.callbacks.preemption import resume_command
from sdft.training.callbacks.training_pictures import TrainingPictures
from sdft.types import Fraction, Positive

FIRST = 5.0
"""Seconds of training before the page is written for the first time: a shorter run writes it once, at its end."""
LONG = 1500.0
"""Seconds of training from which on a run's memory is forecast, which takes up to 15 s, for SDXL."""


class RunPage(L.Callback):
    """Keeps `index.html` and `history.jsonl` in a run folder. An error while it does is a warning.

    run_dir: the run folder.
    every: least seconds between two times that the page is written.
    share: largest share of the time of training that writing takes.
    """

    def __init__(self, run_dir: str, every: Positive = 10.0, share: Fraction = 0.01):
        self.run_dir, self.every, self.share = Path(run_dir), every, share
        self.history = History(self.run_dir)
        self.lines: Sequence[str] = ()
        """What the run says of itself before it starts."""
        self.forecast: Callable[[], dict[str, float]] | None = None
        self.measured = Measured()
        self.hide: Callable[[str], str] = str
        """Takes secrets out of a text."""
        self._pictures = TrainingPictures(self.run_dir)
        self._trainer: Any = None
        self._due, self._began, self._warned = float("inf"), (0, 0.0), False

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._trainer = trainer
        trainer.loggers = [*trainer.loggers, HistoryLogger(self)]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.measured.start()
        self._began = trainer.global_step, time.monotonic()
        self._due = time.monotonic() + FIRST
        self._do(self._start)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.measured.groups = optimizer.param_groups

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if not trainer.is_global_zero:
            return
        self.measured.batch(module.latest, trainer.global_step)
        if time.monotonic() >= self._due:
            self._do(self._forecast_long_run)  # not where a run ends: SIGTERM leaves it only a few seconds
            self._do(self._write)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._do(lambda: self._record_losses(trainer.global_step, last=True))

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._do(lambda: self.history.trained(trainer.global_step))
        if time.monotonic() >= self._due:
            self._do(self._write)

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Record values, and, beside those of training, what was measured of it."""
        if any(name.startswith("train/") for name in values):
            values = {**values, **self.measured.now()}
            self._record_losses(step)
        self.history.values(step, values)

    def ended(self, how: End, reason: str = "") -> None:
        """Record how the run ended, and write its page for the last time."""
        self._do(lambda: self.history.end(how, reason))
        self._do(self._write)

    def _record_losses(self, step: int, last: bool = False) -> None:
        for launched, losses in self.measured.losses_by_timestep(step, last):
            self.history.values(launched, losses)

    def _start(self) -> None:
        trainer = self._trainer
        again = self.hide(resume_command(sys.argv, self.run_dir))
        notes = {"lines": list(self.lines), "resume": again, "device": str(trainer.strategy.root_device)}
        self.history.start(trainer.global_step, trainer.max_steps, **notes)

    def _write(self) -> None:
        begun = time.monotonic()
        self._pictures.note(getattr(self._trainer, "datamodule", None))
        rest = max(self.every, (time.monotonic() - begun) / self.share)
        write_run_page(self.run_dir, every=rest)
        now = time.monotonic()
        self._due = now + max(self.every, (now - begun) / self.share)

    def _forecast_long_run(self) -> None:
        """Once, if the forecast takes less than a hundredth of the run."""
        (first, since), step = self._began, self._trainer.global_step
        pace = (time.monotonic() - since) / max(1, step - first)
        if self.forecast is None or step == first or pace * (self._trainer.max_steps - first) < LONG:
            return
        forecast, self.forecast = self.forecast, None
        write_forecast(self.run_dir, forecast())

    def _do(self, work: Callable[[], Any]) -> None:
        """Do something on the first process; an error is a warning, the first time."""
        if self._trainer is None or not self._trainer.is_global_zero:
            return
        try:
            work()
        except Exception as error:
            if not self._warned:
                rank_zero_warn(f"the page of the run cannot be written ({type(error).__name__}: {error})")
            self._warned = True


class HistoryLogger(Logger):
    """Hands all that a run logs to its page."""

    def __init__(self, page: RunPage):
        super().__init__()
        self.page = page

    @property
    def name(self) -> str:
        return "history"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.page.run_dir)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The config is in receipt.json."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Values at the number of optimizer steps that are done, whichever number others log them with."""
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        page = self.page
        page._do(lambda: page.record(page._trainer.global_step, values))


def pages_of(trainer: L.Trainer) -> list[RunPage]:
    """The callbacks that keep a page of the run: one, or none."""
    return [callback for callback in trainer.callbacks if isinstance(callback, RunPage)]


@contextmanager
def followed(
    trainer: L.Trainer, lines: Sequence[str], forecast: Callable[[], dict[str, float]], hide: Callable[[str], str]
) -> Iterator[None]:
    """Tells the page of a run, if it has one, how what is inside the `with` ends.

    lines: what the run says of itself before it starts. forecast: gives `sdft.board.run_page.write_forecast` its
    figures. hide: takes secrets out of a text.
    """
    pages = pages_of(trainer)
    for page in pages:
        page.lines, page.forecast, page.hide, page._trainer = lines, forecast, hide, trainer
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, SystemExit | KeyboardInterrupt)
        for page in pages:
            page.ended("stopped" if stopped else "failed", "" if stopped else hide(str(error)) or type(error).__name__)
        raise
    for page in pages:
        page.ended("finished")
