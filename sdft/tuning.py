"""Which weights learn: all of some parts (`Full`), or low-rank adapters beside them (`Adapter`, by peft).

Knows the names of the model's parts and turns them into parameter groups; does not know losses or optimisers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from sdft.types import Count, NonNegative, Positive, UserError

UNET_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
ATTENTION_TARGETS = UNET_TARGETS[:4]
ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
ADAPTER = "default"
WORDS = "words"

Part = Literal["unet", "text_encoder", "text_encoder_2"]


class Full:
    """Every weight of `parts` learns.

    lr_scale: a part's learning rate as a multiple of the run's.
    """

    def __init__(self, parts: Sequence[str] = ("unet",), lr_scale: Mapping[str, NonNegative] | None = None):
        self.parts, self.lr_scale = tuple(parts), dict(lr_scale or {})
        unknown = set(self.lr_scale) - set(self.parts)
        if unknown:
            raise UserError(f"tuning.lr_scale names {sorted(unknown)}, which tuning.parts does not train")
        self._initial: dict[str, Tensor] = {}

    def attach(self, model: nn.Module) -> None:
        """Freeze the model but for `parts`, and remember the initial weights."""
        model.requires_grad_(False)
        for part in self.parts:
            model.get_submodule(part).requires_grad_(True)
            freeze_unused_layers(part, model.get_submodule(part))
        self._initial = {name: p.detach().cpu().clone() for name, p in learning(model)}

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """One parameter group a part, with its `name` and `lr_scale`."""
        return parameter_groups(model, self.parts, self.lr_scale)

    @contextmanager
    def base(self, model: nn.Module) -> Iterator[None]:
        """The model as it was before training, inside the `with`."""
        tuned = {name: p.detach().clone() for name, p in learning(model)}
        put(model, self._initial)
        try:
            yield
        finally:
            put(model, tuned)


class Adapter:
    """Low-rank adapters on the attention and feed-forward layers of `parts`; the model's own weights stay.

    rank: of every adapter.
    alpha: the adapter's output is scaled by alpha / rank; as large as the rank by default.
    parts: `unet` for a style; with the text encoders for a new word.
    layers: `all` linears of the transformers, or their `attention` only.
    method: `lora`, or `dora` (weight-decomposed, arXiv:2402.09353).
    dropout: of the adapter's input.
    lr_scale: a part's learning rate as a multiple of the run's; `words` is the part of the new words.
    new_words: word -> initial phrase. Each becomes one token of both encoders and starts as the phrase's mean.
    """

    def __init__(
        self,
        rank: Count,
        alpha: Positive | None = None,
        parts: Sequence[Part] = ("unet",),
        layers: Literal["all", "attention"] = "all",
        method: Literal["lora", "dora"] = "lora",
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

    def attach(self, model: nn.Module) -> None:
        """Freeze the model and add the adapters and words."""
        model.requires_grad_(False)
        for part in self.parts:
            module = model.get_submodule(part)
            inject_adapter_in_model(self.config(part, module), module, adapter_name=ADAPTER)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        if self.new_words:
            model.add_words(self.new_words)
            self._initial_rows = {name: rows.detach().clone() for name, rows in model.word_rows.items()}

    def config(self, part: str, module: nn.Module) -> LoraConfig:
        """The peft configuration of one part."""
        if part == "unet":
            targets = list(UNET_TARGETS if self.layers == "all" else ATTENTION_TARGETS)
            chosen = [name for name, _ in module.named_modules() if name.endswith(tuple(f".{t}" for t in targets))]
        else:
            targets = list(ENCODER_TARGETS if self.layers == "all" else ENCODER_TARGETS[:4])
            unused = unused_layer(part, module)
            chosen = [
                name
                for name, _ in module.named_modules()
                if name.endswith(tuple(f".{t}" for t in targets)) and not (unused and f"{unused}." in f"{name}.")
            ]
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
                rows.copy_(self._initial_rows[name])
            try:
                yield
            finally:
                for name, rows in model.word_rows.items():
                    rows.copy_(learned[name])


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The model without its adapters, inside the `with`. Scale 0 would not do: DoRA rescales the base's columns."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
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
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.set_scale(ADAPTER, scale)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_scale(ADAPTER, 1.0)


def learning(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The named parameters that learn."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into the model's parameters of the same names."""
    for name, p in learning(model):
        p.copy_(weights[name])


def unused_layer(part: str, module: nn.Module) -> str | None:
    """Encoder 1's last layer: its penultimate output is the context, so nothing reaches that layer."""
    return f"encoder.layers.{module.config.num_hidden_layers - 1}" if part == "text_encoder" else None


def freeze_unused_layers(part: str, module: nn.Module) -> None:
    """Take out of training what gets no gradient."""
    unused = unused_layer(part, module)
    for name, parameter in module.named_parameters():
        if unused and (f"{unused}." in name or "final_layer_norm" in name):
            parameter.requires_grad_(False)


def parameter_groups(model: nn.Module, parts: Sequence[str], lr_scale: Mapping[str, float]) -> list[dict[str, Any]]:
    """The learning parameters of each part."""
    groups = []
    for part in parts:
        owned = [p for name, p in learning(model) if part_of(name) == part]
        if not owned:
            raise UserError(f"tuning: nothing learns in {part!r}")
        groups.append({"params": owned, "name": part, "lr_scale": lr_scale.get(part, 1.0)})
    return groups


def part_of(parameter_name: str) -> str:
    """The part a parameter belongs to; the rows of new words are a part of their own."""
    return WORDS if parameter_name.endswith(".rows_ND") else parameter_name.split(".")[0]
