"""The one LightningModule and the one training step.

Joins a model, what learns in it (`tuning`), what it is asked (`objective`) and how it moves (`optimizer`). Which of
them, is the caller's choice: full fine-tunes, adapters, and nano's own parts all train through this step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from sdft.batch import Batch
from sdft.distributed.sharding import clip_gradients
from sdft.errors import UserError
from sdft.models.attention import refuse_device
from sdft.models.sdxl import SDXL
from sdft.planning.footprint import offloaded_parts
from sdft.rng import Draws, seed_of
from sdft.tuning.parameters import part_of, trainable_parameters

VALIDATION_SEED = 0
ENCODER_PARTS = ("embeddings", "encoder", "final_layer_norm", "text_projection")
"""What a text encoder is divided by, where weights are divided; transformers knows the whole of it by its exact class,
which dividing it would change."""


class Step(NamedTuple):
    """What the last forward pass saw and found, for those who watch over it."""

    keys: Sequence[str]
    visits: Sequence[int]
    loss_B: Tensor
    mean_loss: Tensor
    """over all processes"""


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
            model.set_prediction_type(objective.prediction, objective.zero_terminal_snr)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "adapters"))
            tuning.attach(model)
        refuse_low_precision_weights(model)
        model.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted mean loss of a batch."""
        if getattr(self.tuning, "dropout", 0):
            torch.manual_seed(seed_of(self.seed, "dropout", batch.keys[0], batch.visits[0]))
        report = self.objective(self.model, batch, Draws(self.seed, batch.keys, batch.visits))
        figures = self.mean_over_ranks(report.scalars("train"))
        self.latest = Step(batch.keys, batch.visits, report.per_sample_B.detach(), figures["train/loss"])
        self.log_dict(figures, batch_size=len(batch))
        self.log("loss", figures["train/loss"], prog_bar=True, logger=False, batch_size=len(batch))
        return (report.per_sample_B * batch.loss_weight_B).mean()

    def mean_over_ranks(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each figure of the whole batch: the mean over the processes, which have equal shares of it."""
        if self._trainer is None or self.trainer.world_size == 1:
            return figures
        means = self.trainer.strategy.reduce(torch.stack(list(figures.values())), reduce_op="mean")
        return dict(zip(figures, means, strict=True))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The unweighted error on fixed (image, timestep, noise) triples, the same for every run and objective."""
        report = self.comparable(self.model, batch, Draws(VALIDATION_SEED, batch.keys, batch.visits))
        self.log_dict(report.scalars("val"), batch_size=len(batch), sync_dist=True)

    def configure_model(self) -> None:
        """Let a strategy that divides models do so; Lightning asks when the processes know each other."""
        divide, model = getattr(self.trainer.strategy, "divide", None), self.model
        if divide is None:
            return
        if not isinstance(model, SDXL):
            raise UserError("strategy=fsdp divides SDXL only; choose strategy=ddp to train a part of nano")
        stay = "text_encoder" not in offloaded_parts(model, self.trainer.datamodule)
        encoders = (model.text_encoder, model.text_encoder_2) if stay else ()
        named = (pair for encoder in encoders for pair in encoder.named_modules())
        divide([model.unet, *(part for name, part in named if name.split(".")[-1] in ENCODER_PARTS)])

    def on_fit_start(self) -> None:
        """Encode once what stays the same, and send away what has nothing left to do."""
        data, model = self.trainer.datamodule, self.model
        if isinstance(model, SDXL):
            refuse_device(model.unet, self.device)
        if data.cache == "off":
            return
        data.encode_once(model.encode_moments, self.device, vae=model.vae)
        model.offload("vae")
        if "text_encoder" not in offloaded_parts(model, data):
            return
        encoders = (model.text_encoder, model.text_encoder_2)
        if data.encode_texts_once(model.encode_prompts, model.prompt_ids, *encoders):
            model.offload("text_encoder", "text_encoder_2")

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.optimizer(self.tuning.groups(self.model))
        schedule = self.lr_schedule(optimizer, num_steps=self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if gradient_clip_val:
            clip_gradients((p for group in optimizer.param_groups for p in group["params"]), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what learns; everything else comes from `model.weights` again."""
        names = {f"model.{name}" for name, _ in trainable_parameters(self.model)}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other weights than those that learn now; count in batches of this run."""
        recount_batches(checkpoint, self.trainer)
        now = {(f"model.{name}", tuple(p.shape)) for name, p in trainable_parameters(self.model)}
        saved = {(name, tuple(value.shape)) for name, value in checkpoint["state_dict"].items()}
        if now != saved:
            odd = sorted({name for name, _ in now ^ saved})
            raise UserError(f"resume: the checkpoint trains other weights than this run, {len(odd)} of them, "
                            f"for example {odd[0]!r}; resume with the same model, tuning and rank")


def recount_batches(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Make the steps that are done into batches: this run may accumulate otherwise, and half a step is not kept.

    The last batch of the run that saved it need not be that of this one, which may have more steps.
    """
    num_batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    shift = num_batches - progress["current"]["ready"]
    for counts in (progress["total"], progress["current"]):
        for name in counts:
            counts[name] += shift
    progress["is_last_batch"] = False
    checkpoint[type(trainer.datamodule).__qualname__]["batches_done"] = num_batches


def refuse_other_prediction(model: SDXL, objective) -> None:
    """Raise UserError where the run would unlearn what the weights predict; epsilon to v is a known practice."""
    config = model.scheduler.config
    if config.prediction_type == "v_prediction" and objective.prediction == "epsilon":
        fit = "v_zero_snr" if config.rescale_betas_zero_snr else "v"
        raise UserError(f"objective=epsilon: the weights predict v; choose objective={fit}")
    if config.rescale_betas_zero_snr and not objective.zero_terminal_snr:
        raise UserError("objective=v: the weights know a noise schedule that ends in pure noise; choose v_zero_snr")


def refuse_low_precision_weights(model: nn.Module) -> None:
    """Raise UserError where a weight that learns has fewer bits than fp32: small updates would be rounded away."""
    for name, parameter in trainable_parameters(model):
        if parameter.dtype != torch.float32:
            key = f"model.dtype.{part_of(name)}"
            raise UserError(f"{key} is {parameter.dtype}, but a part that learns must be fp32; set {key}=fp32")
