"""`Adapter`: low-rank adapters (LoRA, DoRA, LoHa, LoKr, by peft) train; the base weights stay frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from sdft.distributed.sharding import shard_like
from sdft.errors import UserError
from sdft.tuning.parameters import WORDS, parameter_groups
from sdft.tuning.targets import (
    TARGETS,
    unused_layer,
)
from sdft.types import Count, NonNegative, Positive

LYCORIS = {"loha": LoHaConfig, "lokr": LoKrConfig}
ADAPTER = "default"
Part = Literal["unet", "text_encoder", "text_encoder_2"]


class Adapter:
    """Low-rank adapters on the attention and feed-forward layers of `parts`; the model's own weights stay.

    The adapters are fp32, whatever the model's own weights are.

    rank: of every adapter.
    alpha: the adapter's output is scaled by alpha / rank; as large as the rank by default.
    parts: `unet` for a style; with the text encoders for a new word.
    layers: `all` linears of the transformers, their `attention` only, or `conv`: all, and the 3x3 convolutions of the
        UNet's resnets and samplers (LoCon).
    method: `lora`; `dora` (weight-decomposed, arXiv:2402.09353); `loha` and `lokr` (products of Hadamard and of
        Kronecker, arXiv:2309.14859), which diffusers cannot open.
    dropout: of the adapter's input; not of `loha` and `lokr`.
    lr_scale: a part's learning rate as a multiple of the run's; `words` is the part of the new words.
    new_words: word -> initial phrase. Each becomes one token of both encoders and starts as the phrase's mean.
    """

    def __init__(
        self,
        rank: Count,
        alpha: Positive | None = None,
        parts: Sequence[Part] = ("unet",),
        layers: Literal["all", "attention", "conv"] = "all",
        method: Literal["lora", "dora", "loha", "lokr"] = "lora",
        dropout: Annotated[float, Ge(0)] = 0.0,
        lr_scale: Mapping[str, NonNegative] | None = None,
        new_words: Mapping[str, str] | None = None,
    ):
        self.rank, self.alpha, self.parts, self.layers = rank, alpha or rank, tuple(parts), layers
        self.method, self.dropout = method, dropout
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

    def attach(self, model: nn.Module) -> None:
        """Freeze the model and add the adapters and words."""
        model.requires_grad_(False)
        for part in self.parts:
            module = model.get_submodule(part)
            inject_adapter_in_model(self.config(part, module), module, adapter_name=ADAPTER)
        for layer in adapters(model):
            to_fp32(layer)
        if self.new_words:
            model.add_words(self.new_words)
            self._initial_rows = {name: rows.detach().clone() for name, rows in model.word_rows.items()}

    def config(self, part: str, module: nn.Module) -> PeftConfig:
        """The peft configuration of one part."""
        targets, unused = TARGETS["unet" if part == "unet" else "encoder"][self.layers], unused_layer(part, module)
        chosen = [
            name
            for name, _ in module.named_modules()
            if name.endswith(tuple(f".{t}" for t in targets)) and not (unused and f"{unused}." in f"{name}.")
        ]
        if self.method in LYCORIS:
            # Where torch.rand(1) > module_dropout fails, peft leaves the adapter out: at 0, once in 2^24 times.
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
        """One parameter group a part, with its `name` and `lr_scale`."""
        parts = (*self.parts, WORDS) if self.new_words else self.parts
        return parameter_groups(model, parts, self.lr_scale)

    @contextmanager
    def base(self, model: nn.Module) -> Iterator[None]:
        """The model as it was before training, inside the `with`: no adapters, words at their initial phrases."""
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
    """The model without its adapters, inside the `with`. Scale 0 would not do: DoRA rescales the base's columns."""
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
    """Every adapter at `scale` times its trained strength, inside the `with`."""
    layers = adapters(model)
    for layer in layers:
        layer.set_scale(ADAPTER, scale)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1.0)


def adapters(model: nn.Module) -> list[BaseTunerLayer]:
    """The modules that have an adapter."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def to_fp32(layer: BaseTunerLayer) -> None:
    """Give the adapter of a module fp32 weights: peft gives it those of the module."""
    for name in layer.adapter_layer_names:
        getattr(layer, name).float()
    if getattr(layer, "use_dora", {}).get(ADAPTER):
        # The norms of the module's rows, anew: rounded to bf16 they would change it before any training.
        dora, factors = layer.lora_magnitude_vector[ADAPTER], (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER])
        lora_A, lora_B = (factor.weight for factor in factors)
        scaling = layer.scaling[ADAPTER]
        dora.update_layer(base_layer=layer.get_base_layer(), lora_A=lora_A, lora_B=lora_B, scaling=scaling)
