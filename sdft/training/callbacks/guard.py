"""Stops a run whose loss or gradient is NaN, infinite or diverging, before the optimizer step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import lightning as L
import torch
from annotated_types import Gt
from torch import Tensor

from sdft.distributed.sharding import norm
from sdft.errors import UserError
from sdft.training.lagged import LaggedScalar

MOST_NAMED = 8
"""Samples named in the message; the file lists all."""
WINDOW, LEAST = 100, 5
"""Number of recent values that a new one is compared with, and the least number for a comparison."""
BROKEN = "became NaN or infinite"


class Launched(NamedTuple):
    """A value that is being computed: of which kind, in which step, and from which samples."""

    what: str
    scalar: LaggedScalar
    step: int
    seen: list[dict[str, Any]]


class Guard(L.Callback):
    """Stops all ranks at a loss or gradient that is not finite or diverges, before the optimizer step.

    On a GPU it looks one step behind, so that no step waits for its values, and with `fused_backward` a gradient is
    known only after the update: the weights in memory may then have been spoilt, but no checkpoint is written of them.
    Logs the norm of the gradient before clipping as `train/gradient_norm`.

    run_dir: `bad_samples.json` is written there, with the samples of that step and the loss of each.
    divergence: a loss, or a gradient norm before clipping, diverges above this many times the median of the last 100,
        if it is also above the first of the run: a loss of pairs that has fallen to almost nothing may be log 2 again.
        In sound runs on nano, also with batches of one sample, the largest was 5 times the median.

    Raises UserError.
    """

    def __init__(self, run_dir: str, divergence: Annotated[float, Gt(1)] = 100.0):
        self.file, self.divergence = Path(run_dir) / "bad_samples.json", divergence
        self.recent: dict[str, list[float]] = {"loss": [], "gradient": []}
        self.first: dict[str, float] = {}
        self.lags: bool | None = None
        """Whether it looks one step behind; if None, on GPUs."""
        self._seen: list[dict[str, Any]] = []
        self._launched: list[Launched] = []
        self._trainer: Any = None

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = module.latest
        self._seen.append({"keys": step.keys, "visits": step.visits, "loss": step.loss_B})
        self._look(trainer, "loss", step.mean_loss)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        if module.fused_backward:
            size = optimizer.gradient_norm()
        else:
            size = norm([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None])
        self._look(trainer, "gradient", size)
        module.log("train/gradient_norm", size)
        self._seen = []

    def _look(self, trainer: L.Trainer, what: str, value: Tensor) -> None:
        """Watch a value: now, or, when the next one of its kind has been launched, the last one."""
        self._trainer = trainer
        launched = Launched(what, LaggedScalar(value), trainer.global_step, self._seen)
        if not (value.is_cuda if self.lags is None else self.lags):
            self._watch(launched)
            return
        self._launched.append(launched)
        if what == "gradient":
            earlier = [one for one in self._launched if one.step < launched.step]
            self._launched = self._launched[len(earlier) :]
            for one in earlier:
                self._watch(one)

    def _flush(self) -> None:
        """Watch all that has been launched."""
        due, self._launched = self._launched, []
        for one in due:
            self._watch(one)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._flush()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._flush()

    def state_dict(self) -> dict[str, Any]:
        self._flush()  # a checkpoint that is about to be written
        return {"recent": {what: list(values) for what, values in self.recent.items()}, "first": dict(self.first)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recent, self.first = state["recent"], state.get("first", {})  # earlier versions kept no first

    def _watch(self, launched: Launched) -> None:
        """All ranks get the same value, so they stop together."""
        trainer, (what, scalar, step, seen) = self._trainer, launched
        value, recent = scalar.read(), self.recent[what]
        # In fp16 the loss scaler handles overflow: it skips the step and lowers its scale.
        if what == "gradient" and trainer.precision == "16-mixed" and not math.isfinite(value):
            return
        if not math.isfinite(value):
            self._stop(trainer, what, BROKEN, step, seen)
        usual = median(recent) if len(recent) >= LEAST else math.inf
        if usual and value > max(self.divergence * usual, self.first.get(what, 0.0)):
            times = f"{value / usual:.0f} times the median of the last {len(recent)}"
            self._stop(trainer, what, f"diverged to {value:.3g}, {times},", step, seen)
        self.first.setdefault(what, value)
        recent.append(value)
        del recent[:-WINDOW]

    def _stop(self, trainer: L.Trainer, what: str, how: str, step: int, seen: list[dict[str, Any]]) -> None:
        samples = [
            {"key": key, "visit": visit, "rank": trainer.global_rank, "loss": str(loss)}
            for part in seen
            for key, visit, loss in zip(part["keys"], part["visits"], part["loss"].tolist(), strict=True)
        ]
        if trainer.world_size > 1:
            shares: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, samples)
            samples = [sample for share in shares for sample in share]
        written = f"; {self.file} lists them all"
        if trainer.is_global_zero:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self.file.write_text(json.dumps({"step": step, "wrong": what, "samples": samples}, indent=2) + "\n")
            except OSError as error:
                written = f"; {self.file} cannot be written ({error.strerror})"
        suspects = [sample["key"] for sample in samples if sample["loss"] in ("nan", "inf", "-inf")] or [
            sample["key"] for sample in samples
        ]
        more = f" and {len(suspects) - MOST_NAMED} more" if len(suspects) > MOST_NAMED else ""
        sound = "" if how == BROKEN else "raise callbacks.guard.divergence if this is expected, "
        raise UserError(
            f"the {what} {how} at step {step} with {', '.join(suspects[:MOST_NAMED])}{more}{written}. "
            f"Check these samples, lower optimizer.lr, {sound}or continue from the last checkpoint with resume="
        )
