"""The contracts between the parts of sdft: what each exchangeable class must offer, and the defaults of the rest.

Every class here can be subclassed outside the project and chosen by a config's `_target_`; docs/extending.md shows each
in ten lines. Where a contract is only a callable, it is a `typing.Protocol`; where some of it is optional, it is a base
class whose defaults are right for most.

| contract | chosen by | called by |
|---|---|---|
| `Objective` | `objective=` | `sdft.module.Finetuning` |
| `Weighting`, `TimestepDistribution` | `objective/weighting=`, `objective/timesteps=` | `sdft.objective.denoising` |
| `Tuning` | `tuning=` | `sdft.module.Finetuning` |
| `OptimizerFactory`, `ScheduleFactory` | `optimizer=`, `lr_schedule=` | `sdft.module.Finetuning` |
| `StrategyHooks` | `strategy=` | the module, the callbacks and the training command |
| `WeightAverage` | `callbacks=` | previews, `dry_run` |
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sdft.batch import Batch, Conditioning, LossReport
from sdft.rng import Draws
from sdft.types import Precision

Prediction = Literal["epsilon", "v_prediction"]
"""What a denoiser predicts, as diffusers' schedulers name it."""


class Objective(ABC):
    """The training loss of a batch.

    prediction, zero_terminal_snr: what the model predicts, and whether its noise schedule ends in pure noise.
        The model's scheduler is configured to match. `prediction` is None for losses that are not about denoising.
    """

    prediction: Prediction | None = None
    zero_terminal_snr: bool = False

    @abstractmethod
    def __call__(self, model: Any, batch: Batch, draws: Draws) -> LossReport:
        """The loss of each sample, with gradients. All randomness comes from `draws`, which has a seed per sample."""

    def for_validation(self) -> Objective:
        """The objective on which runs are compared; this one by default."""
        return self


class Weighting(ABC):
    """Weight of a sample's squared error as a function of its signal-to-noise ratio.

    predictions: those for which the weighting is defined.
    """

    predictions: ClassVar[Sequence[Prediction]] = ("epsilon", "v_prediction")

    @abstractmethod
    def __call__(self, snr: Tensor, prediction: Prediction) -> Tensor:
        """Weights of the shape of `snr` (fp64)."""


class TimestepDistribution(Protocol):
    """Maps uniform numbers in [0, 1) (fp64, B) to timesteps in [0, num_timesteps) (int64, B)."""

    def __call__(self, u_B: Tensor, num_timesteps: int) -> Tensor: ...


class Tuning(ABC):
    """Which parameters train, and what of them is saved.

    parts: names of the model's trained submodules.
    new_words: word -> initial phrase, of words that get their own embeddings.
    trains_adapters: whether the result is an adapter beside frozen weights (a LoRA file), or a whole model.
    initial: of a whole model, the weights before training on the CPU, by name; errors of exported files are measured by
        how far training has moved them. Empty if they are not kept.
    """

    parts: Sequence[str]
    new_words: Mapping[str, str] = {}
    trains_adapters: bool = False
    initial: Mapping[str, Tensor] = {}

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

    @abstractmethod
    def base(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside the `with`, the model computes as it did before training."""


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


class WeightAverage(ABC):
    """A Lightning callback that keeps an average of the trainable parameters; previews draw with it."""

    @abstractmethod
    def averaged(self, module: Any) -> AbstractContextManager[None]:
        """Inside the `with`, `module.model` has the averaged parameters."""


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
    def add_words(self, words: Mapping[str, str]) -> None:
        """Add `words` (word -> initial phrase) to the tokenizers, each with a trainable embedding."""

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
