"""`Adapter`: low-rank adapters (LoRA, DoRA, LoHa, LoKr, by peft) train; the base weights stay frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Lt
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sdft.distributed.sharding import shard_like
from sdft.errors import UserError
from sdft.protocols import DiffusionModel, Tuning
from sdft.rng import Draws
from sdft.tuning.dropout import SampleDropout, SampleSeeds
from sdft.tuning.parameters import WORDS, parameter_groups
from sdft.types import NonNegative, Positive, Rank

LYCORIS = {"loha": LoHaConfig, "lokr": LoKrConfig}
ADAPTER = "default"
Part = Literal["unet", "text_encoder", "text_encoder_2"]


class Adapter(Tuning):
    """Train low-rank adapters on the attention and feed-forward layers of `parts`; the base weights stay frozen.

    Adapters are fp32, whatever the dtype of the base weights.

    rank: of every adapter.
    alpha: the adapter's output is scaled by alpha / rank; equal to the rank if None.
    parts: `unet` for a style; with both text encoders for a new word.
    layers: `all` linear layers of the transformer blocks, their `attention` only, or `conv`: all, plus the 3x3
        convolutions of the UNet's resnets and samplers (LoCon).
    method: `lora`; `dora` (weight-decomposed, arXiv:2402.09353); `loha` and `lokr` (Hadamard and Kronecker products,
        arXiv:2309.14859), which diffusers cannot load.
    dropout: probability of zeroing an element of the adapter's input; the mask of a sample does not depend on its batch
        (`tuning.dropout`). Not defined for `loha` and `lokr`.
    lr_scale: learning rate of a part as a multiple of the run's; `words` stands for the embeddings of new words.
    new_words: word -> initial phrase. Each becomes one token of both text encoders, initialised with the mean embedding
        of its phrase.
    """

    trains_adapters = True

    def __init__(
        self,
        rank: Rank,
        alpha: Positive | None = None,
        parts: Sequence[Part] = ("unet",),
        layers: Literal["all", "attention", "conv"] = "all",
        method: Literal["lora", "dora", "loha", "lokr"] = "lora",
        dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
        lr_scale: Mapping[str, NonNegative] | None = None,
        new_words: Mapping[str, str] | None = None,
    ):
        self.rank, self.alpha, self.parts, self.layers = rank, alpha or rank, tuple(parts), layers
        self.method, self.dropout, self._seeds = method, dropout, SampleSeeds()
        self.lr_scale, self.new_words = dict(lr_scale or {}), dict(new_words or {})
        unknown = set(self.lr_scale) - {*self.parts, *([WORDS] if new_words else [])}
        if unknown:
            raise UserError(f"tuning.lr_scale names {sorted(unknown)}, which tuning.parts does not train")
        if self.new_words and len(self.parts) < 3:
            raise UserError("tuning.new_words needs both text encoders: choose tuning=lora_unet_te")
        if layers == "conv" and "unet" not in self.parts:
            raise UserError("tuning.layers=conv: only the UNet has convolutions; set tuning.layers=all")
        if dropout and method in LYCORIS:
            raise UserError(f"tuning.dropout={dropout}: {method} has no input to drop; set tuning.dropout=0")

    def attach(self, model: DiffusionModel) -> None:  # type: ignore[override]
        """Freeze the model, then add the adapters and the embeddings of new words."""
        model.requires_grad_(False)
        for part in self.parts:
            module = model.get_submodule(part)
            inject_adapter_in_model(self.config(model, part), module, adapter_name=ADAPTER)
        for layer in adapters(model):
            to_fp32(layer)
        if self.dropout:
            self._replace_dropout(model)
        if self.new_words:
            model.add_words(self.new_words)
            self._initial_rows = {name: rows.detach().clone() for name, rows in model.word_rows.items()}

    def _replace_dropout(self, model: nn.Module) -> None:
        """Replace peft's `nn.Dropout`, whose masks depend on the batch."""
        for name, layer in model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                layer.lora_dropout[ADAPTER] = SampleDropout(self.dropout, name, self._seeds)

    def seed_dropout(self, draws: Draws, device: torch.device) -> None:
        if self.dropout:
            self._seeds.set(draws, device)

    def config(self, model: DiffusionModel, part: str) -> PeftConfig:
        """The peft configuration of one part."""
        suffixes = tuple(f".{suffix}" for suffix in model.ADAPTER_LAYERS[part][self.layers])
        untrained = model.untrained_parameters(part)
        names = (name for name, _ in model.get_submodule(part).named_modules() if name.endswith(suffixes))
        chosen = [name for name in names if f"{name}.weight" not in untrained]
        if self.method in LYCORIS:
            # peft skips the adapter where torch.rand(1) > module_dropout is false: at 0, once in 2^24 calls.
            options = {"alpha": self.alpha, "module_dropout": -1.0}
            return LYCORIS[self.method](r=self.rank, target_modules=chosen, **options)
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            use_dora=self.method == "dora",
            target_modules=chosen,
            init_lora_weights="gaussian",
        )

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """One parameter group per part, and one for the embeddings of new words."""
        parts = (*self.parts, WORDS) if self.new_words else self.parts
        return parameter_groups(model, parts, self.lr_scale)

    @contextmanager
    def base(self, model: nn.Module) -> Iterator[None]:
        """Inside the `with`, adapters are disabled and new words have their initial embeddings."""
        with disabled(model), torch.no_grad():
            learned = {name: rows.clone() for name, rows in model.word_rows.items()}
            for name, rows in model.word_rows.items():
                rows.copy_(shard_like(rows, self._initial_rows[name]))
            try:
                yield
            finally:
                for name, rows in model.word_rows.items():
                    rows.copy_(learned[name])


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
    for layer in layers:
        layer.set_scale(ADAPTER, scale)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1.0)


def adapters(model: nn.Module) -> list[BaseTunerLayer]:
    """The modules that hold an adapter."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


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
