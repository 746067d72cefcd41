"""What stops a run before its weights take in something that is no number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch

from sdft.shards import norm
from sdft.types import UserError

MOST_NAMED = 8
"""Samples in the message; the file has all of them."""


class Guard(L.Callback):
    """Stops at a loss or gradient that is NaN or infinite, on all ranks at once and before the optimiser's step.

    run_dir: `bad_samples.json` in it tells the samples of that step, and the loss of each.
    """

    def __init__(self, run_dir: str):
        self.file = Path(run_dir) / "bad_samples.json"
        self._seen: list[dict[str, Any]] = []

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = module.latest
        self._seen.append({"keys": step.keys, "visits": step.visits, "loss": step.loss_B})
        if not torch.isfinite(step.mean_loss):
            self._stop(trainer, "loss")

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # In fp16 the loss scaler looks for this itself, skips the step and lowers its scale.
        if trainer.precision != "16-mixed" and not torch.isfinite(norm(gradients)):
            self._stop(trainer, "gradient")
        self._seen.clear()

    def _stop(self, trainer: L.Trainer, what: str) -> None:
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
        raise UserError(
            f"the {what} became NaN or infinite at step {step} with {', '.join(suspects[:MOST_NAMED])}{more}{written}. "
            "Look at these samples, lower optimizer.lr, or go on from the last checkpoint with resume="
        )
