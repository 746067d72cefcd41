"""The one LightningModule and the one training step.

Joins a model, what learns in it (`tuning`), what it is asked (`objective`) and how it moves (`optimizer`). Which of
them, is the caller's choice: full fine-tunes, adapters, and nano's own parts all train through this step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from sdft.models.attention import refuse_device
from sdft.models.sdxl import SDXL
from sdft.rng import Draws, seed_of
from sdft.tuning import learning, part_of
from sdft.types import Batch, LossReport, UserError

VALIDATION_SEED = 0


class Finetuning(L.LightningModule):
    """Fine-tuning of `model`.

    seed: of everything random in the steps.
    """

    def __init__(self, model: nn.Module, tuning, objective, optimizer: Callable, lr_schedule: Callable, seed: int):
        super().__init__()
        self.model, self.tuning, self.objective = model, tuning, objective
        self.optimizer, self.lr_schedule, self.seed = optimizer, lr_schedule, seed
        self.strict_loading = False
        self.comparable = objective.comparable() if hasattr(objective, "comparable") else objective
        if hasattr(objective, "prediction"):
            refuse_other_prediction(model, objective)
            model.expect(objective.prediction, objective.zero_terminal_snr)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "adapters"))
            tuning.attach(model)
        refuse_narrow_weights(model)
        model.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted mean loss of a batch."""
        report = self.objective(self.model, batch, Draws(self.seed, batch.keys, batch.visits))
        refuse_nonfinite(report, batch, self.global_step)
        self.log_dict(report.scalars("train"), batch_size=len(batch))
        self.log("loss", report.per_sample_B.detach().mean(), prog_bar=True, logger=False, batch_size=len(batch))
        return (report.per_sample_B * batch.loss_weight_B).mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The unweighted error on fixed (image, timestep, noise) triples, the same for every run and objective."""
        report = self.comparable(self.model, batch, Draws(VALIDATION_SEED, batch.keys, batch.visits))
        self.log_dict(report.scalars("val"), batch_size=len(batch), sync_dist=True)

    def on_fit_start(self) -> None:
        """Encode once what stays the same, and send away what has nothing left to do."""
        data, model = self.trainer.datamodule, self.model
        if isinstance(model, SDXL):
            refuse_device(model.unet, self.device)
        if data.cache == "off":
            return
        data.encode_once(model.encode_moments, self.device, vae=model.vae)
        model.send_away("vae")
        encoders = (model.text_encoder, model.text_encoder_2)
        learn = any(p.requires_grad for encoder in encoders for p in encoder.parameters())
        kept = data.cache == "disk" and not learn
        if kept and data.encode_texts_once(model.encode_prompts, model.prompt_ids, *encoders):
            model.send_away("text_encoder", "text_encoder_2")

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer(self.tuning.groups(self.model))
        schedule = self.lr_schedule(optimizer, num_steps=self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what learns; everything else comes from `model.weights` again."""
        names = {f"model.{name}" for name, _ in learning(self.model)}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other weights than those that learn now."""
        now = {(f"model.{name}", tuple(p.shape)) for name, p in learning(self.model)}
        saved = {(name, tuple(value.shape)) for name, value in checkpoint["state_dict"].items()}
        if now != saved:
            odd = sorted({name for name, _ in now ^ saved})
            raise UserError(f"resume: the checkpoint trains other weights than this run, {len(odd)} of them, "
                            f"for example {odd[0]!r}; resume with the same model, tuning and rank")


def refuse_other_prediction(model: SDXL, objective) -> None:
    """Raise UserError where the run would unlearn what the weights predict; epsilon to v is a known practice."""
    config = model.scheduler.config
    if config.prediction_type == "v_prediction" and objective.prediction == "epsilon":
        fit = "v_zero_snr" if config.rescale_betas_zero_snr else "v"
        raise UserError(f"objective=epsilon: the weights predict v; choose objective={fit}")
    if config.rescale_betas_zero_snr and not objective.zero_terminal_snr:
        raise UserError("objective=v: the weights know a noise schedule that ends in pure noise; choose v_zero_snr")


def refuse_narrow_weights(model: nn.Module) -> None:
    """Raise UserError where a weight that learns has fewer bits than fp32: small updates would be rounded away."""
    for name, parameter in learning(model):
        if parameter.dtype != torch.float32:
            key = f"model.dtype.{part_of(name)}"
            raise UserError(f"{key} is {parameter.dtype}, but a part that learns must be fp32; set {key}=fp32")


def refuse_nonfinite(report: LossReport, batch: Batch, step: int) -> None:
    """Stop at a loss that is no number, before the weights take it in, and name the samples it came from."""
    finite_B = torch.isfinite(report.per_sample_B)
    if not finite_B.all():
        keys = [key for key, finite in zip(batch.keys, finite_B.tolist(), strict=True) if not finite]
        raise UserError(
            f"the loss became NaN or infinite at step {step} for {', '.join(keys)}; look at these samples, lower "
            "optimizer.lr, or resume=RUN_FOLDER from the last checkpoint"
        )
