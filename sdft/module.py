"""The one LightningModule and the one training step.

Combines a model, its trainable parameters (`tuning`), a loss (`objective`) and an optimizer. Full fine-tuning, adapters
and nano's own networks all train through this step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn

from sdft.batch import Batch
from sdft.distributed.sharding import clip_gradients
from sdft.errors import UserError
from sdft.models.attention import refuse_device
from sdft.models.offload import alone_on_device
from sdft.models.quantized import quantized_layers
from sdft.models.streaming import streams
from sdft.objective.denoising import Denoising
from sdft.optimizers.optimizers import Groups, averages_weights, probe, scale_rates
from sdft.optimizers.parameterwise import ParameterwiseOptimizer, refuse_fused_backward
from sdft.optimizers.schedules import by_part, refuse_unknown_parts
from sdft.protocols import DiffusionModel, Objective, OptimizerFactory, ScheduleFactory, Tuning, strategy_hooks
from sdft.rng import Draws, Position, seed_of
from sdft.tuning.parameters import buffers_beside, copy_parameters, learned_state, part_of, trainable_parameters
from sdft.tuning.stops import drop_gradients

VALIDATION_SEED = 0
PREDICTED = {
    "epsilon": ("epsilon", "epsilon"),
    "v_prediction": ("v", "v"),
    "sample": ("x0", "z0"),
    "flow_prediction": ("flow", "a flow"),
}
"""What a model predicts -> the option of `objective` that trains it, and its name."""


class Step(NamedTuple):
    """The samples and the loss of the last forward pass, for callbacks."""

    keys: Sequence[str]
    visits: Sequence[int]
    loss_B: Tensor
    mean_loss: Tensor
    """over all processes"""
    time_B: Tensor | None = None
    """On the CPU: see `LossReport`."""


class Finetuning(L.LightningModule):
    """Fine-tuning of `model`.

    model: a `DiffusionModel`, or a single network with an objective of its own.
    tuning: which parameters train.
    objective: the loss.
    optimizer: builds the optimizer from parameter groups; their rates are multiplied by the groups' `lr_scale`.
    lr_schedule: builds the schedule, stepped once per optimizer step.
    seed: of all randomness in training.
    fused_backward: update each parameter during the backward pass, and free its gradient
        (`sdft.optimizers.parameterwise`). Gradients are then clipped one parameter at a time.
    part_schedules: schedules of single parts, such as `text_encoder`, in place of `lr_schedule`.

    Trainable weights are fp32, or bf16 with stochastic rounding.

    Raises UserError where the objective does not fit what the weights predict, or a trainable weight has another dtype.
    """

    def __init__(
        self,
        model: nn.Module,
        tuning: Tuning,
        objective: Objective,
        optimizer: OptimizerFactory,
        lr_schedule: ScheduleFactory,
        seed: int,
        fused_backward: bool = False,
        part_schedules: Mapping[str, ScheduleFactory] | None = None,
    ):
        super().__init__()
        require("tuning", tuning, Tuning)
        require("objective", objective, Objective)
        self.model, self.tuning, self.objective = model, tuning, objective
        self.optimizer, self.lr_schedule, self.seed = optimizer, lr_schedule, seed
        self.fused_backward, self.part_schedules = fused_backward, dict(part_schedules or {})
        self.strict_loading = False
        self.validation_objective = objective.for_validation()
        if objective.prediction is not None:
            refuse_other_prediction(model, objective, tuning)
            tuning.base_scheduler = model.scheduler
            model.set_prediction_type(objective.prediction, objective.zero_terminal_snr)
        if not tuning.trains_adapters:
            refuse_quantized(model)
        if objective.needs_adapters and not (tuning.trains_adapters and tuning.parts):
            raise UserError("objective/prior: the base is asked at every step; choose tuning=lora_unet or lora_unet_te")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "adapters"))
            tuning.attach(model)
        refuse_weights_that_lose_updates(model)
        if self.part_schedules:
            refuse_unknown_parts(tuning.groups(model), self.part_schedules)
        objective.attach(partial(tuning.base, model))
        model.train()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted mean loss of a batch."""
        draws = Draws(self.seed, batch.keys, batch.visits, self.position(batch_idx, len(batch)))
        self.tuning.seed_dropout(draws, batch.loss_weight_B.device)
        report = self.objective(self.model, batch, draws)
        values = self.mean_over_ranks(report.scalars("train"))
        loss_B = report.per_sample_B.detach()
        self.latest = Step(batch.keys, batch.visits, loss_B, values["train/loss"], report.time_B)
        self.log_dict(values, batch_size=len(batch))
        return (report.per_sample_B * batch.loss_weight_B).mean()

    def position(self, batch_idx: int, num: int) -> Position | None:
        """Where in the run a batch of `num` samples is; None without a trainer."""
        if self._trainer is None:
            return None
        per_batch, accumulated = num * self.trainer.world_size, self.trainer.accumulate_grad_batches
        first = batch_idx % accumulated * per_batch + self.trainer.global_rank * num
        step = self.trainer.global_step
        return Position(step, first, accumulated * per_batch, step / max(self.trainer.max_steps, 1))

    def mean_over_ranks(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each value averaged over the processes, which hold equal shares of the batch."""
        if self._trainer is None or self.trainer.world_size == 1:
            return values
        means = self.trainer.strategy.reduce(torch.stack(list(values.values())), reduce_op="mean")
        return dict(zip(values, means, strict=True))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The unweighted error on fixed (image, timestep, noise) triples, the same for every run and objective."""
        report = self.validation_objective(self.model, batch, Draws(VALIDATION_SEED, batch.keys, batch.visits))
        self.log_dict(report.scalars("val"), batch_size=len(batch), sync_dist=True)

    def configure_model(self) -> None:
        """Let the strategy shard the model; Lightning calls this once the processes are connected."""
        if self.trainer.world_size > 1 and streams(self.model):
            raise UserError("model.offload_blocks: it works on one device; set trainer.devices=1, or set it to 0")
        hooks = strategy_hooks(self.trainer.strategy)
        if hooks.num_shards(self.trainer.world_size) == 1:
            return
        if not isinstance(self.model, DiffusionModel):
            raise UserError("strategy=fsdp shards diffusion models only; choose strategy=ddp to train a single network")
        if key := self.tuning.needs_whole:
            raise UserError(f"{key}: computes with whole weights, which strategy=fsdp shards; choose strategy=ddp")
        refuse_sharded(self.optimizer, self.updates_parameterwise())
        if any(quantized_layers(self.model)):
            raise UserError("strategy=fsdp cannot shard quantised weights: set 'model.quantization={}' or strategy=ddp")
        hooks.shard(self.model.modules_to_shard(self.cached_parts(self.trainer.datamodule.cache)))

    def cached_parts(self, cache: Literal["ram", "disk", "off"]) -> set[str]:
        """Parts that no training step calls, because their outputs are cached."""
        if not isinstance(self.model, DiffusionModel):
            return set()
        return self.model.cached_parts(cache, {part_of(name) for name, _ in trainable_parameters(self.model)})

    def on_fit_start(self) -> None:
        """Fill the caches, and offload the parts that they replace."""
        data, model = self.trainer.datamodule, self.model
        if not isinstance(model, DiffusionModel):
            return
        refuse_device(model.denoiser, self.device)
        cached = self.cached_parts(data.cache)
        if model.VAE in cached:
            with alone_on_device(model, model.VAE):
                data.encode_once(model.encode_moments, self.device, vae=model.get_submodule(model.VAE))
            model.offload(model.VAE)
        texts = cached >= {*model.TEXT_ENCODERS}
        if texts and data.encode_texts_once(model.encode_prompts, model.prompt_ids, *model.text_encoders):
            model.offload(*model.TEXT_ENCODERS)

    @contextmanager
    def averaged_by_optimizer(self) -> Iterator[None]:
        """Inside the `with`, the model has the weights that a schedule-free optimizer averages, if it has one."""
        optimizer = self._averaging_optimizer()
        if optimizer is None:
            yield
            return
        # Not `optimizer.train()` afterwards: its arithmetic would not give back the same bits.
        trained = {name: p.detach().clone() for name, p in trainable_parameters(self.model)}
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
            copy_parameters(self.model, trained)

    def on_validation_start(self) -> None:
        self._validating = ExitStack()
        self._validating.enter_context(self.averaged_by_optimizer())

    def on_validation_end(self) -> None:
        self._validating.close()

    def on_fit_end(self) -> None:
        optimizer = self._averaging_optimizer()
        if optimizer is not None:
            optimizer.eval()

    def _averaging_optimizer(self) -> Any:
        """The run's optimizer if it is schedule-free, else None."""
        return next(filter(averages_weights, self.trainer.optimizers), None)

    def build_optimizer(self) -> torch.optim.Optimizer:
        """A new optimizer of the trainable parameters, with the learning rate of each part."""

        return self.optimizer_of(self.tuning.groups(self.model), self.fused_backward)

    def updates_parameterwise(self) -> bool:
        """Whether parameters are updated one at a time: in the backward pass, or because they are in bf16."""
        return self.fused_backward or any(p.dtype == torch.bfloat16 for _, p in trainable_parameters(self.model))

    def optimizer_of(self, groups: Groups, in_backward: bool) -> torch.optim.Optimizer:
        """A new optimizer of these parameter groups."""

        def build(groups: Groups) -> torch.optim.Optimizer:
            return scale_rates(self.optimizer(groups))

        if not self.updates_parameterwise():
            return build(groups)
        clip = self.trainer.gradient_clip_val if in_backward and self._trainer is not None else None
        return ParameterwiseOptimizer(build, groups, self.seed, in_backward, clip or 0.0)

    def configure_optimizers(self) -> dict[str, Any]:
        if self.fused_backward:
            refuse_fused_backward(self.trainer)
            if self.tuning.stop_at:
                raise UserError("tuning.stop_at: fused_backward=true keeps no gradients to leave out; set one of them")
        optimizer = self.build_optimizer()
        schedule = by_part(optimizer, self.lr_schedule, self.part_schedules, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.tuning.stop_at:
            drop_gradients(self.model, self.tuning.stop_at, self.trainer.global_step / self.trainer.max_steps)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.tuning.after_step(self.model, optimizer.optimizer)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if gradient_clip_val and not self.fused_backward:
            clip_gradients((p for group in optimizer.param_groups for p in group["params"]), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only trainable parameters and the buffers beside them; others are read from `model.weights` again."""
        names = {f"model.{name}" for name in learned_state(self.model)}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError for a checkpoint with other trainable parameters than this run's."""
        recount_batches(checkpoint, self.trainer)
        now = {(f"model.{name}", tuple(p.shape)) for name, p in trainable_parameters(self.model)}
        beside = {f"model.{name}" for name, _ in buffers_beside(self.model)}
        saved = {(name, tuple(value.shape)) for name, value in checkpoint["state_dict"].items() if name not in beside}
        if now != saved:
            odd = sorted({name for name, _ in now ^ saved})
            raise UserError(
                f"resume: the checkpoint has other trainable parameters than this run, {len(odd)} of them, "
                f"for example {odd[0]!r}; resume with the same model, tuning and rank"
            )


def require(key: str, built: Any, contract: type) -> None:
    """Raise UserError where what a config built does not inherit from the contract of its key."""
    if not isinstance(built, contract):
        name = type(built).__name__
        raise UserError(f"{key}: {name} is not a sdft.protocols.{contract.__name__}; let the class inherit from it")


def recount_batches(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Convert the checkpoint's optimizer steps to batches of this run, which may accumulate differently.

    The last batch of the run that saved the checkpoint need not be the last of this one, which may have more steps.
    """
    num_batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    shift = num_batches - progress["current"]["ready"]
    for counts in (progress["total"], progress["current"]):
        for name in counts:
            counts[name] += shift
    progress["is_last_batch"] = False
    checkpoint[type(trainer.datamodule).__qualname__]["batches_done"] = num_batches


def refuse_other_prediction(model: DiffusionModel, objective: Objective, tuning: Tuning) -> None:
    """Raise UserError where training would undo what the weights predict, or adapters would have to relearn it.

    Epsilon to v is established practice, also with adapters; z0 and the flow take a full fine-tune.
    """
    config = model.scheduler.config
    there, wanted = str(config.prediction_type), str(objective.prediction)
    if there == "epsilon" and wanted in ("sample", "flow_prediction") and tuning.trains_adapters:
        name, _ = PREDICTED[wanted]
        raise UserError(f"objective={name}: the weights predict epsilon; choose tuning=full, which can relearn that")
    if there not in ("epsilon", wanted):
        (name, _), (fit, predicted) = PREDICTED[wanted], PREDICTED[there]
        if not isinstance(objective, Denoising):  # another objective would learn something else
            key = "objective.prediction"
            raise UserError(f"{key}={wanted}: the weights predict {predicted}; set {key}={there}")
        fit = "v_zero_snr" if config.rescale_betas_zero_snr else fit
        raise UserError(f"objective={name}: the weights predict {predicted}; choose objective={fit}")
    if config.rescale_betas_zero_snr and not objective.zero_terminal_snr:
        raise UserError("objective=v: the weights were trained with zero terminal SNR; choose objective=v_zero_snr")


def refuse_weights_that_lose_updates(model: nn.Module) -> None:
    """Raise UserError for a trainable weight that is neither fp32 nor bf16, which is rounded stochastically."""
    for name, parameter in trainable_parameters(model):
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            key = f"model.dtype.{part_of(name)}"
            raise UserError(f"{key} is {parameter.dtype}, in which small updates are lost; set it to fp32 or bf16")


def refuse_sharded(optimizer: OptimizerFactory, parameterwise: bool) -> None:
    """Raise UserError for an optimizer, or weights in bf16, that has not been shown to work on sharded weights."""
    chosen = type(probe(optimizer))
    if parameterwise:
        raise UserError("strategy=fsdp: weights in bf16 are updated singly, which sharded ones cannot be; set fp32")
    packages = {base.__module__.partition(".")[0] for base in chosen.__mro__}
    if packages & {"bitsandbytes", "pytorch_optimizer", "transformers"}:
        raise UserError(
            f"strategy=fsdp: {chosen.__name__} needs whole weights, or was not tested with sharded ones; choose "
            "optimizer=adamw, or strategy=ddp"
        )


def refuse_quantized(model: nn.Module) -> None:
    """Raise UserError for quantised weights in a model that will train, and be exported, as a whole."""
    for name, layer in quantized_layers(model):
        raise UserError(
            f"model.quantization.{part_of(name)}={layer.format}: quantised weights are frozen, and only adapters train "
            "beside them; set 'model.quantization={}', or tuning=lora_unet"
        )
