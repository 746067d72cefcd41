"""`Adapter`: adapters (LoRA, DoRA, LoHa, LoKr, by peft; OFT, BOFT) train; the base weights stay frozen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sdft.errors import UserError
from sdft.formats.lora_layer import Layer, most_common
from sdft.protocols import DiffusionModel, Tuning
from sdft.rng import Draws
from sdft.tuning import norms, rotation
from sdft.tuning.dropout import ModuleDropout, RankDropout, SampleDropout, SampleSeeds
from sdft.tuning.initialization import start_from_weight
from sdft.tuning.norm_limit import limit_norms
from sdft.tuning.parameters import WORDS, parameter_groups
from sdft.tuning.start import fill_from, move_vectors, read_start
from sdft.tuning.stops import read_stops
from sdft.tuning.targets import by_pattern, is_chosen, is_convolution, target_names
from sdft.tuning.words import NewWords, Vectors
from sdft.types import Fraction, NonNegative, Positive, Rank

LYCORIS = {"loha": LoHaConfig, "lokr": LoKrConfig}
ADAPTER = "default"
Part = Literal["unet", "text_encoder", "text_encoder_2"]
Probability = Annotated[float, Ge(0), Lt(1)]


class Adapter(Tuning):
    """Train low-rank adapters on the attention and feed-forward layers of `parts`; the base weights stay frozen.

    Adapters are fp32, whatever the dtype of the base weights. Names of layers are `part.module`; in patterns of names,
    `*` stands for any text, as in `unet.up_blocks.0.*`, and the last pattern that matches counts.

    rank: of every adapter. rank_pattern: pattern of names -> rank.
    alpha: the adapter's output is scaled by alpha / rank; equal to the rank if None. alpha_pattern: pattern -> alpha.
    rslora: scale by alpha / sqrt(rank), so that high ranks learn as fast as low ones (arXiv:2312.03732).
    conv_rank, conv_alpha: of 3x3 convolutions; `rank` and `alpha` if None.
    parts: `unet` for a style; with both text encoders for a new word.
    layers: `all` linear layers of the transformer blocks, their `attention` only, or `conv`: all, plus the 3x3
        convolutions of the UNet's resnets and samplers (LoCon).
    include, exclude: patterns of the layers that get an adapter, and of those that get none.
    method: `lora`; `dora` (weight-decomposed, arXiv:2402.09353); `loha` and `lokr` (Hadamard and Kronecker products,
        arXiv:2309.14859), which diffusers cannot load; nor `oft` (arXiv:2306.07280) and `boft` (arXiv:2311.06243),
        which rotate the outputs of a layer in blocks of up to `rank` channels.
    init: first factors of a LoRA: `gaussian` or `kaiming` for A, with B zero; `pissa` (arXiv:2404.02948) and `olora`
        (arXiv:2406.01775) start from a part of the weights. Those are saved with twice the rank, as the difference to
        the base.
    dropout: probability of zeroing an element of the adapter's input. rank_dropout: of dropping a rank.
        module_dropout: of dropping the adapter of a layer. Each is drawn for each sample, whatever its batch
        (`tuning.dropout`).
    lora_plus: learning rate of B as a multiple of A's; 16 in arXiv:2402.12354.
    max_norm: largest Frobenius norm of an adapter's change of its weight; larger ones are scaled down after each step.
    lr_scale: learning rate of a part as a multiple of the run's; `words` stands for the embeddings of new words,
        and may be set where words could be trained, so that a recipe can have it.
    stop_at: part -> share of the run's steps after which it is frozen.
    train_norms: train the norms of `parts` that `include` and `exclude` leave too. train_biases: the biases of layers
        with an adapter.
    start: a LoRA file of any layout, from which training goes on. Layers that it has keep its ranks and alphas.
    new_words: word -> initial phrase, whose mean embedding in both text encoders it starts from.
    vectors: number of embeddings of each new word, or of words by name.

    Raises UserError for options that exclude each other, or mean nothing with `method`.
    """

    trains_adapters = True

    def __init__(
        self,
        rank: Rank,
        alpha: Positive | None = None,
        parts: Sequence[Part] = ("unet",),
        layers: Literal["all", "attention", "conv"] = "all",
        method: Literal["lora", "dora", "loha", "lokr", "oft", "boft"] = "lora",
        dropout: Probability = 0.0,
        lr_scale: Mapping[str, NonNegative] | None = None,
        new_words: Mapping[str, str] | None = None,
        rslora: bool = False,
        init: Literal["gaussian", "kaiming", "pissa", "olora"] = "gaussian",
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        rank_pattern: Mapping[str, Rank] | None = None,
        alpha_pattern: Mapping[str, Positive] | None = None,
        conv_rank: Rank | None = None,
        conv_alpha: Positive | None = None,
        rank_dropout: Probability = 0.0,
        module_dropout: Probability = 0.0,
        lora_plus: Positive | None = None,
        max_norm: Positive | None = None,
        stop_at: Mapping[str, Fraction] | None = None,
        start: str | None = None,
        vectors: Vectors = 1,
        train_norms: bool = False,
        train_biases: bool = False,
    ):
        self.initial: dict[str, Tensor] = {}
        self.train_norms, self.train_biases = train_norms, train_biases
        self.rank, self.alpha, self.parts, self.layers = rank, alpha, tuple(parts), layers
        self.method, self.rslora, self.init, self.start = method, rslora, init, start
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.rank_pattern, self.alpha_pattern = dict(rank_pattern or {}), dict(alpha_pattern or {})
        self.conv_rank, self.conv_alpha = conv_rank, conv_alpha
        self.dropouts = {SampleDropout: dropout, RankDropout: rank_dropout, ModuleDropout: module_dropout}
        self.lora_plus, self.max_norm, self._seeds = lora_plus, max_norm, SampleSeeds()
        self._words = NewWords(new_words or {}, vectors)
        self.new_words, self.lr_scale = self._words.words, dict(lr_scale or {})
        self.needs_whole = "tuning.max_norm" if max_norm is not None else ""
        trained = {*self.parts, *([WORDS] if new_words else [])}
        rated = trained | ({WORDS} if len(self.parts) == 3 else set())
        if unknown := set(self.lr_scale) - rated:
            raise UserError(f"tuning.lr_scale names {sorted(unknown)}, which tuning.parts does not train")
        self.stop_at = read_stops(stop_at, sorted(trained))
        if self.new_words and len(self.parts) < 3:
            raise UserError("tuning.new_words needs both text encoders: choose tuning=lora_unet_te, or tuning=words")
        if layers == "conv" and "unet" not in self.parts:
            raise UserError("tuning.layers=conv: only the UNet has convolutions; set tuning.layers=all")
        self._refuse_meaningless(dropout=dropout, rank_dropout=rank_dropout, module_dropout=module_dropout)

    def _refuse_meaningless(self, **dropouts: float) -> None:
        """Raise UserError for options that mean nothing with the method, or with each other."""
        given: dict[str, Any] = {f"tuning.{name}": value for name, value in dropouts.items() if value}
        plain: dict[str, Any] = {"tuning.rslora": self.rslora, "tuning.lora_plus": self.lora_plus}
        plain["tuning.max_norm"] = self.max_norm
        start_only: dict[str, Any] = {"tuning.init": self.init != "gaussian" and self.init}
        if self.method in LYCORIS:
            refused = given | plain | start_only
        elif self.method in rotation.METHODS:
            scales = {"tuning.alpha": self.alpha, "tuning.conv_alpha": self.conv_alpha}
            refused = given | plain | start_only | scales | {"tuning.alpha_pattern": self.alpha_pattern}
        elif self.method == "dora":
            refused = {key: value for key, value in given.items() if key != "tuning.dropout"}
            refused |= {"tuning.max_norm": self.max_norm} | (start_only if self.init != "kaiming" else {})
        else:
            refused = {}
        for key, value in refused.items():
            if value:
                raise UserError(f"{key}={value}: is not defined for tuning.method={self.method}; remove it")
        convs = {"tuning.conv_rank": self.conv_rank, "tuning.conv_alpha": self.conv_alpha}
        for key, value in convs.items():
            if value and self.layers != "conv":
                raise UserError(f"{key}={value}: no convolution gets an adapter; set tuning.layers=conv")
        if self.start is not None and self.init != "gaussian":
            raise UserError(f"tuning.init={self.init}: the adapter starts from tuning.start={self.start}; remove one")

    def attach(self, model: DiffusionModel) -> None:  # type: ignore[override]
        """Freeze the model, then add the adapters and the embeddings of new words.

        Raises UserError for patterns that match no layer, and for a `start` that does not fit.
        """
        model.requires_grad_(False)
        started = read_start(self.start, model) if self.start is not None else {}
        if self.method in rotation.METHODS:
            rotation.rotate_layers(model, self._layers(model, started)[0], self.method)
        else:
            for part, config in self.configs(model, started).items():
                inject_adapter_in_model(config, model.get_submodule(part), adapter_name=ADAPTER)
        for layer in adapters(model):
            to_fp32(layer)
            if self.init in ("pissa", "olora"):
                start_from_weight(layer, ADAPTER, self.init)
        fill_from(started, model)
        chosen = partial(is_chosen, include=self.include, exclude=self.exclude)
        self.initial = norms.unfreeze(model, self.parts, self.train_norms, self.train_biases, chosen)
        if self.start is not None:
            move_vectors(self.start, model, self.initial)
        self._add_dropout(model)
        if self.new_words:
            self._words.attach(model)

    def _add_dropout(self, model: nn.Module) -> None:
        """Add dropout by sample in the place of peft's `nn.Dropout`, whose masks depend on the batch."""
        chosen = {kind: p for kind, p in self.dropouts.items() if p}
        for name, layer in model.named_modules() if chosen else ():
            if not isinstance(layer, BaseTunerLayer):
                continue
            made = {kind: kind(p, name, self._seeds) for kind, p in chosen.items()}
            by_rank = made.pop(RankDropout, None)
            if made:
                one = next(iter(made.values()))
                layer.lora_dropout[ADAPTER] = one if len(made) == 1 else nn.Sequential(*made.values())
            if by_rank is not None:
                layer.rank_dropout = by_rank  # a submodule, so that it is told of training and evaluation
                layer.lora_A[ADAPTER].register_forward_hook(partial(dropped_ranks, by_rank))

    def seed_dropout(self, draws: Draws, device: torch.device) -> None:
        if any(self.dropouts.values()):
            self._seeds.set(draws, device)

    def configs(self, model: DiffusionModel, started: Mapping[str, Layer] | None = None) -> dict[str, PeftConfig]:
        """The peft configuration of each part. started: layers of the file from which training goes on."""
        ranks, alphas = self._layers(model, started)
        return {part: self._config(part, list(ranks), ranks, alphas) for part in self.parts}

    def _layers(
        self, model: DiffusionModel, started: Mapping[str, Layer] | None
    ) -> tuple[dict[str, int], dict[str, float]]:
        """The rank and the alpha of each layer with an adapter."""
        names = target_names(model, self.parts, self.layers, self.include, self.exclude)
        ranks, alphas = self._ranks(model, names), {}
        for name, rank in by_pattern("tuning.alpha_pattern", names, self.alpha_pattern, 0.0).items():
            wide = is_convolution(model.get_submodule(name))
            alphas[name] = rank or (self.conv_alpha if wide else None) or self.alpha or ranks[name]
        for name, layer in (started or {}).items():
            if name not in ranks:
                raise UserError(
                    f"tuning.start={self.start}: has an adapter of {name}, which gets none here; "
                    "choose tuning.layers, include and parts as the file has them"
                )
            ranks[name] = layer.rank or 1
            alphas[name] = layer.scale * (ranks[name] ** 0.5 if self.rslora else ranks[name])
        return ranks, alphas

    def _ranks(self, model: DiffusionModel, names: Sequence[str]) -> dict[str, int]:
        ranks = by_pattern("tuning.rank_pattern", names, self.rank_pattern, 0)
        wide = {name for name in names if is_convolution(model.get_submodule(name))}
        return {name: rank or (self.conv_rank if name in wide else None) or self.rank for name, rank in ranks.items()}

    def _config(
        self, part: str, names: Sequence[str], ranks: Mapping[str, int], alphas: Mapping[str, float]
    ) -> PeftConfig:
        """The peft configuration of one part; ranks and alphas other than the most common are patterns."""
        own = {name.removeprefix(f"{part}."): name for name in names if name.startswith(f"{part}.")}
        rank, alpha = (most_common([of[name] for name in own.values()]) for of in (ranks, alphas))
        options: dict[str, Any] = {
            "r": rank,
            "target_modules": list(own),
            "rank_pattern": {exactly(short): ranks[name] for short, name in own.items() if ranks[name] != rank},
            "alpha_pattern": {exactly(short): alphas[name] for short, name in own.items() if alphas[name] != alpha},
        }
        if self.method in LYCORIS:
            # peft skips the adapter where torch.rand(1) > module_dropout is false: at 0, once in 2^24 calls.
            return LYCORIS[self.method](**options, alpha=alpha, module_dropout=-1.0)
        return LoraConfig(
            **options,
            lora_alpha=alpha,
            use_dora=self.method == "dora",
            use_rslora=self.rslora,
            init_lora_weights=self.init != "kaiming" and "gaussian",
        )

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """One parameter group per part, and one for the embeddings of new words; with LoRA+, another for each B.

        Factors that start from the weights do not decay, as 0 is not where they came from.
        """
        parts = (*self.parts, WORDS) if self.new_words else self.parts
        groups = parameter_groups(model, parts, self.lr_scale, self.lora_plus)
        return [group | {"weight_decay": 0.0} for group in groups] if self.init in ("pissa", "olora") else groups

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.max_norm is not None:
            limit_norms(adapters(model), ADAPTER, self.max_norm)

    @contextmanager
    def base(self, model: nn.Module) -> Iterator[None]:
        """Inside the `with`, adapters are disabled; norms, biases and new words have their initial values."""
        with disabled(model), norms.restored(model, self.initial), self._words.initial(model):
            yield

    def refuse_strength(self, key: str) -> None:
        if self.method == "dora" or self.method in rotation.METHODS:
            kind = {"dora": "DoRA"}.get(self.method, self.method.upper())
            raise UserError(f"{key}: the strength of a {kind} must be 0 or 1")

    @contextmanager
    def at_strength(self, model: nn.Module, strength: float) -> Iterator[None]:
        """Inside the `with`, adapters, norms and biases have `strength` times their change; new words stay as they
        are."""
        with scaled(model, strength), norms.scaled(model, self.initial, strength):
            yield


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, all adapters are disabled. Scale 0 is not enough: DoRA rescales the base's columns."""
    layers = adapters(model)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def scaled(model: nn.Module, scale: float) -> Iterator[None]:
    """Inside the `with`, every adapter has `scale` times its trained strength."""
    layers = adapters(model)
    trained = [layer.scaling[ADAPTER] for layer in layers]
    for layer in layers:
        layer.set_scale(ADAPTER, scale)
    try:
        yield
    finally:
        for layer, scaling in zip(layers, trained, strict=True):
            layer.scaling[ADAPTER] = scaling


def adapters(model: nn.Module) -> list[BaseTunerLayer]:
    """The modules that hold an adapter."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def exactly(name: str) -> str:
    """The pattern of peft that matches this name only."""
    return f"^{re.escape(name)}"


def dropped_ranks(dropout: RankDropout, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """A forward hook of the lower factor of a LoRA."""
    return dropout(output)


def to_fp32(layer: BaseTunerLayer) -> None:
    """Cast the adapter of a module to fp32: peft creates it in the dtype of the module."""
    for name in layer.adapter_layer_names:
        getattr(layer, name).float()
    if getattr(layer, "use_dora", {}).get(ADAPTER):
        # Recompute the row norms: rounded to bf16 they would change the model before any training.
        dora, factors = layer.lora_magnitude_vector[ADAPTER], (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])
        lora_A, lora_B = (factor.weight for factor in factors)
        scaling = layer.scaling[ADAPTER]
        dora.update_layer(base_layer=layer.get_base_layer(), lora_A=lora_A, lora_B=lora_B, scaling=scaling)
