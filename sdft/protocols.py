"""The contracts between the parts of sdft: what each exchangeable class must offer, and the defaults of the rest.

Every class here can be subclassed outside the project and chosen by a config's `_target_`; docs/extending.md shows each
in ten lines. Where a contract is only a callable, it is a `typing.Protocol`; where some of it is optional, it is a base
class whose defaults are right for most.

| contract | chosen by | called by |
|---|---|---|
| `Objective` | `objective=` | `sdft.module.Finetuning` |
| `Weighting`, `TimestepDistribution` | `objective/weighting=`, `objective/timesteps=` | `sdft.objective.denoising` |
| `Loss`, `Noise` | `objective/loss=`, `objective/noise=` | `sdft.objective.denoising` |
| `Tuning` | `tuning=` | `sdft.module.Finetuning` |
| `OptimizerFactory`, `ScheduleFactory` | `optimizer=`, `lr_schedule=` | `sdft.module.Finetuning` |
| `StrategyHooks` | `strategy=` | the module, the callbacks and the training command |
| `WeightAverage` | `callbacks=` | previews, `dry_run` |
| `ChecksTuning` | `callbacks=` | the training command, before the weights are read |
| `Verdict` | `verdict=` | the training command, after the last step |
| `DiffusionModel` | `model=` | everything that trains or draws |
| `Source` (`sdft.data.source`) | `data=` | `sdft.data.datamodule.Images` |
| `Captioner` (`sdft.captioning.captioner`) | `captioner=` | `python -m sdft.data caption` |
| `Segmenter` (`sdft.masking.segmenters`) | `segmenter=` | `python -m sdft.data mask` |
| `Metric` (`sdft.evaluation.metrics.protocol`) | `metrics=` | `sdft.evaluation.comparison` |
| `MergeMethod` (`sdft.merging.annotations`) | `merge=` | `sdft.merging.merge` |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sdft.batch import Batch, Conditioning, LossReport
from sdft.errors import UserError
from sdft.rng import Draws
from sdft.types import Precision

Prediction = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
"""What a denoiser predicts, as diffusers' schedulers name it; `sample` is z0."""


class Objective(ABC):
    """The training loss of a batch.

    prediction, zero_terminal_snr: what the model predicts, and whether its noise schedule ends in pure noise.
        The model's scheduler is configured to match. `prediction` is None for losses that are not about denoising.
    needs_adapters: whether every step asks the model before training, which only adapters can step aside for.
    """

    prediction: Prediction | None = None
    zero_terminal_snr: bool = False
    needs_adapters: bool = False

    @abstractmethod
    def __call__(self, model: Any, batch: Batch, draws: Draws) -> LossReport:
        """The loss of each sample, with gradients. All randomness comes from `draws`, which has a seed per sample."""

    def attach(self, base: Callable[[], AbstractContextManager[None]]) -> None:  # noqa: B027  a default
        """Called once, after `Tuning.attach`, by the module; losses that need no reference model ignore it.

        base: inside the `with`, the model computes as it did before training.
        """

    def for_validation(self) -> Objective:
        """The objective on which runs are compared; this one by default."""
        return self


class Weighting(ABC):
    """Weight of a sample's squared error as a function of its signal-to-noise ratio.

    predictions: those for which the weighting is defined.
    """

    predictions: ClassVar[Sequence[Prediction]] = ("epsilon", "v_prediction", "sample", "flow_prediction")

    @abstractmethod
    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        """Weights of the shape of `snr` (fp64)."""

    def at_time(self, time: Tensor, snr: Tensor, prediction: Prediction) -> Tensor:
        """Weights of samples at `time`, a share of the schedule in [0, 1) (fp64); by default, those of their SNR."""
        return self(snr, prediction)


class TimestepDistribution(Protocol):
    """Maps uniform numbers in [0, 1) (fp64, B) to timesteps in [0, num_timesteps) (int64, B)."""

    def __call__(self, u_B: Tensor, num_timesteps: int) -> Tensor: ...


class Loss(Protocol):
    """The error of each element of a prediction; the squared error is the usual one."""

    def __call__(self, prediction: Tensor, target: Tensor, snr_B: Tensor, time_B: Tensor) -> Tensor:
        """Errors B x C x H x W. snr_B: signal-to-noise ratios. time_B: shares of the schedule in [0, 1). Both fp64."""
        ...


class Noise(Protocol):
    """The noise that is added to clean latents."""

    def __call__(self, draws: Draws, z0_BCHW: Tensor) -> Tensor:
        """eps, of the shape, dtype and device of z0. All randomness comes from `draws`."""
        ...


class Tuning(ABC):
    """Which parameters train, and what of them is saved.

    parts: names of the model's trained submodules.
    new_words: word -> initial phrase, of words that get their own embeddings.
    trains_adapters: whether the result is an adapter beside frozen weights (a LoRA file), or a whole model.
    needs_whole: the key of an option that computes with whole weights, which sharded ones are not; empty if none does.
    stop_at: part -> share of the run's steps after which it is frozen.
    initial: of a whole model, the weights before training on the CPU, by name; errors of exported files are measured by
        how far training has moved them. Empty if they are not kept. Of an adapter, those of the norms and biases that
        train beside it; its files hold how far training has moved them.
    base_scheduler: the model's scheduler before the objective chose what is predicted; None: it is the same.
    """

    parts: Sequence[str]
    new_words: Mapping[str, str] = {}
    trains_adapters: bool = False
    needs_whole: str = ""
    stop_at: Mapping[str, float] = {}
    initial: Mapping[str, Tensor] = {}
    base_scheduler: Any = None

    @abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Prepare a freshly loaded model: freeze it, then add or unfreeze the trainable parameters."""

    @abstractmethod
    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer, each with `params`, a `name` and `lr_scale`, a factor on the rate."""

    def seed_dropout(self, draws: Draws, device: torch.device) -> None:  # noqa: B027  a default
        """Seed the dropout masks of a batch by its samples, before its forward pass; by default there is no dropout.

        draws: of the batch. device: of the model's inputs.
        """

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027  a default
        """Called after each optimizer step; may change the trained parameters. By default nothing happens."""

    @abstractmethod
    def base(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside the `with`, the model computes as it did before training."""

    @contextmanager
    def drawing_base(self, model: Any) -> Iterator[None]:
        """Inside the `with`, the model also draws as it did before training: where it learns to predict v, say, its
        weights before that still predict the noise."""
        with self.base(model):
            scheduler = getattr(model, "scheduler", None)
            if self.base_scheduler is not None:
                model.scheduler = self.base_scheduler
            try:
                yield
            finally:
                if self.base_scheduler is not None:
                    model.scheduler = scheduler

    def refuse_strength(self, key: str) -> None:
        """Raise UserError, in the name of a config key, unless what is trained can be used at any strength."""
        raise UserError(f"{key}: only an adapter has a strength, 0 is without training; remove it, or set it to 0 or 1")

    def at_strength(self, model: nn.Module, strength: float) -> AbstractContextManager[None]:
        """Inside the `with`, what is trained changes the model `strength` times as much; see `refuse_strength`."""
        raise NotImplementedError

    def drawing_at(self, model: Any, strength: float) -> AbstractContextManager[None]:
        """Inside the `with`, the model draws with this strength of what is trained: at 0 as before training, at 1 as it
        is."""
        if strength == 0:
            return self.drawing_base(model)
        return nullcontext() if strength == 1 else self.at_strength(model, strength)


class OptimizerFactory(Protocol):
    """Any class of `torch.optim`, with its options bound: `_target_: torch.optim.SGD`, `_partial_: true`."""

    def __call__(self, params: Iterable[dict[str, Any]], /) -> torch.optim.Optimizer: ...


class ScheduleFactory(Protocol):
    """A learning-rate schedule of an optimizer for a run of `num_steps` optimizer steps."""

    def __call__(
        self, optimizer: torch.optim.Optimizer, *, num_steps: int
    ) -> torch.optim.lr_scheduler.LRScheduler: ...


class StrategyHooks:
    """What a strategy may do besides Lightning's own interface; the defaults fit one that keeps whole copies.

    A strategy of Lightning that does not inherit from this class gets the defaults through `strategy_hooks`.
    """

    def num_shards(self, world_size: int) -> int:
        """Among how many processes one copy of the trained weights is sharded."""
        return 1

    def shard(self, modules: Iterable[nn.Module]) -> None:
        """Shard the parameters of `modules`; called once the processes are connected, before the optimizer exists."""

    def gather(self, module: Any, rebuild: Callable[[], Any]) -> Any:
        """On rank 0, a module that holds all trained weights by itself. Collective: every rank must call it."""
        return module

    def wait_for_saves(self) -> None:
        """Block until the last checkpoint is complete on disk. Collective."""

    def after_save(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0 once the last checkpoint is complete."""
        action()


def strategy_hooks(strategy: Any) -> StrategyHooks:
    """The hooks of a strategy; the defaults for one that does not inherit from `StrategyHooks`."""
    return strategy if isinstance(strategy, StrategyHooks) else StrategyHooks()


class KeepsAverages:
    """A Lightning callback with fp32 averages of the trainable parameters. num_averages: how many, for the memory that
    a run is planned with; they are on the host if its config has `offload: true`."""

    num_averages: ClassVar[int] = 1


class WeightAverage(KeepsAverages, ABC):
    """A Lightning callback that keeps an average of the trainable parameters; previews draw with it."""

    @abstractmethod
    def averaged(self, module: Any) -> AbstractContextManager[None]:
        """Inside the `with`, `module.model` has the averaged parameters."""


@runtime_checkable
class ChecksTuning(Protocol):
    """A Lightning callback that does not fit every tuning, and says so before the weights are read."""

    def check_tuning(self, tuning: Tuning) -> None:
        """Raise UserError if the callback has no meaning beside this tuning."""


class Verdict(Protocol):
    """Judges a finished run and returns metrics for `summary.json`; may write images into `folder`.

    base: a context manager inside which the model computes as it did before training.
    """

    def __call__(
        self,
        model: Any,
        base: Callable[[], AbstractContextManager[None]],
        folder: Path,
        precision: Precision = "fp32",
    ) -> dict[str, Any]: ...


@runtime_checkable
class PartialVerdict(Protocol):
    """A `Verdict` that knows before training which of its metrics it cannot measure."""

    def unmeasured(self) -> Mapping[str, str]:
        """Name of a metric in `summary.json` -> why it will be null, and the remedy."""


@runtime_checkable
class AddsToSummary(Protocol):
    """A Lightning callback with entries for `summary.json`."""

    def summary(self) -> Mapping[str, Any]:
        """Name -> number or text, at the end of the run."""


class NoiseConfig(NamedTuple):
    """The noise schedule of a model family: scaled-linear betas, as diffusers calls them."""

    num_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012


class DiffusionModel(nn.Module, ABC):
    """A latent diffusion model: what training, sampling, planning and export need from a model family.

    A family is a subclass with its networks as submodules (`sdft.models.sdxl.SDXL`), a loader, and the key tables of
    its file formats. Single networks, such as nano's VAE, train through the same step without being one.

    PARTS: names of the networks, as submodules and in configs. DENOISER, VAE: those two. TEXT_ENCODERS: the others.
    ADAPTER_LAYERS: part -> name of a choice (`attention`, `all`, `conv`) -> suffixes of the modules that get adapters.
    scheduler: a diffusers scheduler whose config holds the noise schedule and the prediction type.
    word_vectors: number of embeddings of the added words that have several.
    original_weights: opens the file of weights that are quantised in memory; None if none are.
    decoded_tile: side in pixels of the tiles in which images are decoded; None: they are decoded whole.
    offload_idle: whether the other parts wait on the CPU while the VAE works: for small GPUs.
    working_device: where the model computes while its denoiser waits elsewhere; None otherwise.
    """

    PARTS: ClassVar[Sequence[str]]
    DENOISER: ClassVar[str]
    VAE: ClassVar[str]
    TEXT_ENCODERS: ClassVar[Sequence[str]]
    ADAPTER_LAYERS: ClassVar[Mapping[str, Mapping[str, Sequence[str]]]]
    scheduler: Any
    word_vectors: Mapping[str, int] = {}
    original_weights: Callable[[], Any] | None = None
    decoded_tile: int | None = None
    offload_idle: bool = False
    working_device: torch.device | None = None

    @property
    def denoiser(self) -> nn.Module:
        """The network that is called at every denoising step."""
        return self.get_submodule(self.DENOISER)

    @property
    def text_encoders(self) -> list[nn.Module]:
        """The networks that read the prompt, in the order of TEXT_ENCODERS."""
        return [self.get_submodule(name) for name in self.TEXT_ENCODERS]

    @property
    def device(self) -> torch.device:
        """Of the denoiser; offloaded parts are elsewhere."""
        return self.working_device or next(self.denoiser.parameters()).device

    @property
    def noise_config(self) -> NoiseConfig:
        """The noise schedule the model was trained on."""
        config = self.scheduler.config
        return NoiseConfig(config.num_train_timesteps, config.beta_start, config.beta_end)

    @property
    @abstractmethod
    def vae_factor(self) -> int:
        """Pixels per latent position along each axis."""

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """C of the latents."""

    @property
    @abstractmethod
    def size_multiple(self) -> int:
        """Both sides of an image, in pixels, must be multiples of this."""

    @abstractmethod
    def set_prediction_type(self, prediction: str, zero_terminal_snr: bool) -> None:
        """Configure the scheduler for what the denoiser predicts, and on which noise schedule."""

    @abstractmethod
    def encode_moments(self, pixels_BCHW: Tensor) -> Tensor:
        """Mean and log variance of the VAE's posterior, stacked on C; pixels are in [-1, 1]."""

    @abstractmethod
    def encode_images(self, batch: Batch, eps_BCHW: Tensor | None = None) -> Tensor:
        """Scaled latents z0 of the batch: a posterior sample with noise `eps`, or the mean if None."""

    @abstractmethod
    def latent_shape(self, batch: Batch) -> tuple[int, int, int]:
        """(C, H, W) of the latents of the batch."""

    @abstractmethod
    def encode_prompts(self, captions: Sequence[str], dropped: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(context B x L x D, pooled B x P); `dropped` marks prompts that become the empty one."""

    @abstractmethod
    def prompt_ids(self, caption: str) -> list[list[list[int]]]:
        """Token ids by text encoder and chunk; equal ids give equal embeddings, so they address the cache."""

    @abstractmethod
    def condition(self, batch: Batch) -> Conditioning:
        """The conditioning of a training batch."""

    @abstractmethod
    def condition_prompts(self, context_BLD: Tensor, pooled_BP: Tensor, size_hw: tuple[int, int]) -> Conditioning:
        """The conditioning of encoded prompts, for sampling images of `size_hw` pixels."""

    @abstractmethod
    def denoise(self, z_t_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The denoiser's prediction for noisy latents at timesteps t, fp32."""

    @abstractmethod
    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Pixels in [-1, 1] of scaled latents."""

    def pipeline(self) -> Any:
        """A diffusers pipeline of these networks, with which exported files are read back; None by default.

        Without one, adapter files are read back by sdft itself, and whole models cannot be exported.
        """
        return None

    @abstractmethod
    def add_words(self, words: Mapping[str, str], vectors: Mapping[str, int] = {}) -> None:
        """Add `words` (word -> initial phrase) to the tokenizers, each with trainable embeddings.

        vectors: word -> number of its embeddings; 1 by default.
        """

    @property
    @abstractmethod
    def word_rows(self) -> dict[str, Tensor]:
        """Embeddings of the added words, N x D by text encoder; empty without added words."""

    def untrained_parameters(self, part: str) -> set[str]:
        """Names of parameters of a part that never receive a gradient; none by default."""
        return set()

    def modules_to_shard(self, offloaded: Iterable[str]) -> list[nn.Module]:
        """Modules that FSDP wraps as units of their own; parts in `offloaded` take no part in the step."""
        return [self.get_submodule(part) for part in self.PARTS if part not in {*offloaded, self.VAE}]

    def cached_parts(self, cache: Literal["ram", "disk", "off"], trained: Iterable[str]) -> set[str]:
        """Parts that no training step calls, because their outputs are cached.

        The VAE with any cache; the text encoders with a disk cache, if none of `trained` is one of them.
        """
        if cache == "off":
            return set()
        frozen_encoders = cache == "disk" and not {*self.TEXT_ENCODERS, "words"} & {*trained}
        return {self.VAE, *(self.TEXT_ENCODERS if frozen_encoders else ())}

    def offload(self, *parts: str) -> None:
        """Move parts that the next steps do not call to the CPU; whoever calls them moves them back for the call."""
        for part in parts:
            self.get_submodule(part).to("cpu")
