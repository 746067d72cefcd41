"""Measures a few pictures of fixed prompts while a run goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import numpy as np
from annotated_types import Gt, Le

from sdft.board.curves import WATCHED
from sdft.errors import UserError
from sdft.evaluation.image_grid import save_grid
from sdft.evaluation.stopping import Measurement, StoppingRule
from sdft.evaluation.watching import Watched
from sdft.formats.output import atomic_output
from sdft.hardware import autocast_precision
from sdft.optimizers.schedules import fall_to_come
from sdft.protocols import DiffusionModel, strategy_hooks
from sdft.training.callbacks.averaged import averaged_weights
from sdft.training.callbacks.preemption import say
from sdft.training.callbacks.tracking import log_picture
from sdft.training.checkpoints import checkpoint_of, folder_of

WARM_UP = 10
"""Steps before the time of a step and of a picture are taken."""
MARGIN = 1.25
"""A measurement takes longer than its pictures: they are also measured."""


class Watch(L.Callback):
    """Draws and measures `measures` during training, with the averaged parameters if a callback keeps an average.

    Figures are logged as `watch/NAME`, and written to `watch/measurements.jsonl` in the run folder with the value of
    each picture; the pictures are `watch/step_000040.png`. Random numbers of the training are not touched: the weights
    are the same without this callback.

    run_dir: the run folder.
    every: optimizer steps between two measurements, or, below 1, their share of the run; `budget` does not count then.
        By default they are spread evenly over the run, as many as the budget allows, and the last one is that of the
        last step.
    budget: largest share of the training time.
    stop: ends the run when its figures say so; the weights of that step are exported. It needs `every`: the steps that
        a budget allows depend on the machine, and so would the weights.
    keep: save a checkpoint `checkpoints/step_000040.ckpt` at each measurement, for `python -m sdft.choosing`.

    Raises UserError for `stop` or `keep` without `every`, and for a model that draws no images.
    """

    def __init__(
        self,
        run_dir: str,
        measures: Watched,
        every: Annotated[float, Gt(0)] | None = None,
        budget: Annotated[float, Gt(0), Le(1)] = 0.05,
        stop: StoppingRule | None = None,
        keep: bool = False,
    ):
        if every is None and (stop is not None or keep):
            key = "keep" if stop is None else "stop"
            raise UserError(f"callbacks.watch.{key}: needs callbacks.watch.every: a budget depends on the machine")
        self.file, self.checkpoints = Path(run_dir) / WATCHED, Path(folder_of(run_dir))
        self.folder, self.measures, self.every, self.budget = self.file.parent, measures, every, budget
        self.stop, self.keep = stop, keep
        self.stopped: str | None = None
        self.history: list[Measurement] = []
        self.seconds, self._begun, self._begun_step = 0.0, 0.0, 0
        self._planned: set[int] | None = None
        self._cost = 0.0
        self._base: dict[str, np.ndarray] | None = None
        self._last = 0
        self._sharded = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not isinstance(module.model, DiffusionModel):
            raise UserError("callbacks.watch: draws with diffusion models only; choose callbacks=default")
        source = trainer.datamodule.train_set.source  # type: ignore[attr-defined]
        self.measures.see_training(source)
        self._begun, self._begun_step = time.monotonic(), trainer.global_step
        self._last = trainer.global_step
        if trainer.is_global_zero:
            self.history = read_measurements(self.file, until=trainer.global_step)
            if self.file.is_file():
                write_measurements(self.file, self.history)
        if self.every is not None:
            every = max(1, round(self.every * (trainer.max_steps if self.every < 1 else 1)))
            self._planned = {*range(every, trainer.max_steps, every), trainer.max_steps}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._last:
            return
        self._last = step
        # Sharded weights are gathered only if all ranks compute.
        self._sharded = strategy_hooks(trainer.strategy).num_shards(trainer.world_size) > 1
        if trainer.is_global_zero or self._sharded:
            self._watch(trainer, module, step)
        if step in (self._planned or ()):
            self._end(trainer, step)

    def _watch(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        if self._planned is None and step - self._begun_step >= WARM_UP:
            self._plan(trainer, module, step)
        if step not in (self._planned or ()):
            return
        late = self.every is None and self.seconds + self._cost > self.budget * self._expected_seconds(trainer, step)
        if not self._agreed(trainer, late):
            self._measure(trainer, module, step)
        elif trainer.is_global_zero:
            say(f"callbacks.watch: step {step} is not measured, which would take more than budget={self.budget:g}")

    def _end(self, trainer: L.Trainer, step: int) -> None:
        """After a measurement, on all ranks: keep a checkpoint, and stop the run if its figures say so."""
        if self.keep and step < trainer.max_steps:
            trainer.save_checkpoint(checkpoint_of(self.checkpoints, step), weights_only=False)
        if self.stop is None or step == trainer.max_steps:
            return
        self.stopped = trainer.strategy.broadcast(self.stop(self.history), src=0)
        if self.stopped is not None:
            trainer.should_stop = True
            if trainer.is_global_zero:
                say(f"stopped after step {step} of {trainer.max_steps}: {self.stopped}")

    def summary(self) -> dict[str, Any]:
        """The last figures, what measuring took, and why the run was stopped, if it was."""
        last = self.history[-1].means if self.history else {}
        found: dict[str, Any] = {f"watch/{name}": value for name, value in last.items()}
        found["watch_seconds"] = round(self.seconds, 1)
        return found if self.stopped is None else found | {"stopped_because": self.stopped}

    def _agreed(self, trainer: L.Trainer, value: Any) -> Any:
        """The value of rank 0 where all ranks compute: their clocks differ."""
        return trainer.strategy.broadcast(value) if self._sharded else value

    def _expected_seconds(self, trainer: L.Trainer, step: int) -> float:
        """How long the whole run will train, without what this callback takes, by the steps until now."""
        trained = time.monotonic() - self._begun - self.seconds
        return trained / (step - self._begun_step) * (trainer.max_steps - self._begun_step)

    def _plan(self, trainer: L.Trainer, module: Any, step: int) -> None:
        """Choose the steps of the measurements, by the time of a step and of the first pictures."""
        started = time.monotonic()
        first = slice(self.measures.sampler.batch_size)
        with module.tuning.drawing_base(module.model):
            self.measures.draw(module.model, autocast_precision(trainer.precision), first)
        took = time.monotonic() - started
        self.seconds += took
        num = self.measures.num_pictures
        self._cost = MARGIN * took * max(1.0, num / self.measures.sampler.batch_size)
        allowed = self.budget * self._expected_seconds(trainer, step) - self.seconds - self._cost  # the base's pictures
        count = self._agreed(trainer, max(int(allowed / self._cost), 0))
        self._planned = spread(count, step, trainer.max_steps)
        if count == 0 and trainer.is_global_zero:
            say(
                f"callbacks.watch: {num} pictures take {self._cost:.0f} s, more than budget={self.budget:g} of the "
                "run allows; raise it, lower num_images, num_others and num_training, or set every=STEPS"
            )

    def _measure(self, trainer: L.Trainer, module: Any, step: int) -> None:
        started = time.monotonic()
        precision = autocast_precision(trainer.precision)
        if self._base is None:
            with module.tuning.drawing_base(module.model):
                self._base = self.measures.draw(module.model, precision)
            self.measures.see_base(self._base)
            if trainer.is_global_zero and not self.history:
                self._keep(Measurement.of(0, self.measures(self._base)))
            self.seconds, started = self.seconds + time.monotonic() - started, time.monotonic()
        with averaged_weights(trainer, module):
            pictures = self.measures.draw(module.model, precision)
        if trainer.is_global_zero:
            schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
            to_fall = max((fall_to_come(one, step, trainer.max_steps) for one in schedules), default=0.0)
            found = Measurement.of(step, self.measures(pictures), rate_to_fall=to_fall)
            self._keep(found)
            for logger in trainer.loggers:
                logger.log_metrics({f"watch/{name}": figure for name, figure in found.means.items()}, step - 1)
            self._save(trainer, pictures, step)
        self._cost = time.monotonic() - started
        self.seconds += self._cost

    def _keep(self, measurement: Measurement) -> None:
        self.history.append(measurement)
        write_measurements(self.file, self.history)

    def _save(self, trainer: L.Trainer, pictures: dict[str, np.ndarray], step: int) -> None:
        assert self._base is not None
        prompts = [wanted.prompt for of_set in self.measures.wanted.values() for wanted in of_set]
        rows = [np.concatenate(list(of_step.values())) for of_step in (self._base, pictures)]
        path = self.folder / f"step_{step:06d}.png"
        save_grid(path, rows, ["base", f"step {step}"], prompts)
        log_picture(trainer, "watch", path, step)

    def state_dict(self) -> dict[str, Any]:
        return {"planned": sorted(self._planned or ()) or None, "seconds": self.seconds, "cost": self._cost}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.every is None and state["planned"] is not None:
            self._planned, self._cost = set(state["planned"]), state["cost"]


def spread(count: int, now: int, last: int) -> set[int]:
    """`count` steps, evenly spread between the present one and the last, which is among them; at most all."""
    count = min(count, last - now)
    return {last - (last - now) * n // count for n in range(count)}


def read_measurements(file: Path, until: int | None = None) -> list[Measurement]:
    """The measurements of a run by step, those after the step `until` left out; [] if there is no file."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    found = [Measurement.from_json(json.loads(line)) for line in lines if line]
    return [one for one in found if until is None or one.step <= until]


def write_measurements(file: Path, history: list[Measurement]) -> None:
    """Write the file anew, whole or not at all."""
    with atomic_output(file, overwrite=True) as path:
        path.write_text("".join(json.dumps(one.to_json()) + "\n" for one in history), encoding="utf-8")
