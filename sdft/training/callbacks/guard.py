"""Stops a run whose loss or gradient is NaN, infinite or diverging, before the optimizer step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Gt

from sdft.distributed.sharding import norm
from sdft.errors import UserError

MOST_NAMED = 8
"""Samples named in the message; the file lists all."""
WINDOW, LEAST = 100, 5
"""Number of recent values that a new one is compared with, and the least number for a comparison."""
BROKEN = "became NaN or infinite"


class Guard(L.Callback):
    """Stops all ranks at a loss or gradient that is not finite or diverges, before the optimizer step.

    With `fused_backward`, the weights have been updated with a bad gradient when it is found; checkpoints have not.

    run_dir: `bad_samples.json` is written there, with the samples of that step and the loss of each.
    divergence: a loss, or a gradient norm before clipping, above this many times the median of the last 100 diverges.
        In sound runs on nano, also with batches of one sample, the largest was 5 times the median.

    Raises UserError.
    """

    def __init__(self, run_dir: str, divergence: Annotated[float, Gt(1)] = 100.0):
        self.file, self.divergence = Path(run_dir) / "bad_samples.json", divergence
        self.recent: dict[str, list[float]] = {"loss": [], "gradient": []}
        self._seen: list[dict[str, Any]] = []

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = module.latest
        self._seen.append({"keys": step.keys, "visits": step.visits, "loss": step.loss_B})
        self._watch(trainer, "loss", float(step.mean_loss))

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        if module.fused_backward:
            size = float(optimizer.gradient_norm())
        else:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            size = float(norm(gradients))
        # In fp16 the loss scaler handles overflow: it skips the step and lowers its scale.
        if trainer.precision != "16-mixed" or math.isfinite(size):
            self._watch(trainer, "gradient", size)
        self._seen.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"recent": {what: list(values) for what, values in self.recent.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recent = state["recent"]

    def _watch(self, trainer: L.Trainer, what: str, value: float) -> None:
        """All ranks get the same value, so they stop together."""
        recent = self.recent[what]
        if not math.isfinite(value):
            self._stop(trainer, what, BROKEN)
        usual = median(recent) if len(recent) >= LEAST else math.inf
        if usual and value > self.divergence * usual:
            times = f"{value / usual:.0f} times the median of the last {len(recent)}"
            self._stop(trainer, what, f"diverged to {value:.3g}, {times},")
        recent.append(value)
        del recent[:-WINDOW]

    def _stop(self, trainer: L.Trainer, what: str, how: str) -> None:
        samples = [
            {"key": key, "visit": visit, "rank": trainer.global_rank, "loss": str(loss)}
            for part in self._seen
            for key, visit, loss in zip(part["keys"], part["visits"], part["loss"].tolist(), strict=True)
        ]
        if trainer.world_size > 1:
            shares: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, samples)
            samples = [sample for share in shares for sample in share]
        step = trainer.global_step
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
