"""Frozen linear layers whose weights are held in 8 or 4 bits (QLoRA, arXiv:2305.14314).

A weight is dequantised for each product, in the dtype of the product, and freed after it; the backward pass does so
again. Adapters beside it train as beside any other layer.

Not the tensor subclasses of torchao (0.18): their products ignore autocast, peft cannot train a DoRA on them, and a
forecast cannot trace them. Not the layers of bitsandbytes: they quantise when they are moved to a GPU, so that weights
first need room in full, and those of 8 bits also round activations. Its kernels for nf4 are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdft.errors import UserError

Format = Literal["int8", "fp8", "nf4"]
FORMATS: Sequence[str] = get_args(Format)
BLOCK = 64
"""Weights that share a scale in nf4."""


class QuantizedLinear(nn.Linear):
    """A frozen linear layer of `in_features` x `out_features` with quantised weights.

    format: `int8`: integers of -127 to 127, and a scale per row. `fp8`: float8_e4m3fn, and a scale per row.
        `nf4`: 16 quantiles of the normal distribution, two weights per byte, and a scale per 64 weights.
    codes: the quantised weights, integers. scales: fp32. bias: in its own dtype, or None.
    """

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, format: Format):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.format, self.bias = in_features, out_features, format, bias
        codes, scales = quantize(torch.empty(out_features, in_features, device="meta"), format)
        self.codes, self.scales = nn.Parameter(codes, requires_grad=False), nn.Parameter(scales, requires_grad=False)

    def dequantized(self, dtype: torch.dtype, codes: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
        """The weights, out x in, in `dtype`; those of other codes and scales if given."""
        codes, scales = self.codes if codes is None else codes, self.scales if scales is None else scales
        return dequantize(codes, scales, self.format, (self.out_features, self.in_features), dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights, dequantised in fp32 at each access, for whoever looks at them outside of a step."""
        return self.dequantized(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _Product.apply(x.to(dtype), self.codes, self.scales, bias, self)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"


class _Product(torch.autograd.Function):
    """x @ weight.T + bias, which keeps the codes for the backward pass and not the dequantised weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Any:
        ctx.layer = layer
        ctx.save_for_backward(codes, scales)  # not those of the layer, which may be on another device by then
        return F.linear(x, layer.dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        codes, scales = ctx.saved_tensors
        bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[3] else None
        return grad @ ctx.layer.dequantized(grad.dtype, codes, scales), None, None, bias, None


def quantize(weight: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a weight, out x in."""
    if format == "nf4":
        _nf4_kernels()
        return torch.ops.bitsandbytes.quantize_4bit(weight.float().contiguous(), BLOCK, "nf4", torch.uint8)
    largest = 127.0 if format == "int8" else torch.finfo(torch.float8_e4m3fn).max
    weight = weight.float()
    scales = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / largest
    scaled = weight / scales
    if format == "int8":
        return scaled.round().to(torch.int8), scales
    # As integers, so that casts of a whole network leave them alone.
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scales


def dequantize(codes: Tensor, scales: Tensor, format: Format, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The weight that codes and scales stand for."""
    if format == "nf4":
        _nf4_kernels()
        # As one row: on CPUs with AVX-512, bitsandbytes 0.50 takes the wrong scales for rows that are no whole blocks.
        row = [math.prod(shape)]
        return torch.ops.bitsandbytes.dequantize_4bit(codes, scales, BLOCK, "nf4", row, dtype).view(*shape)
    values = codes if format == "int8" else codes.view(torch.float8_e4m3fn)
    return values.to(dtype) * scales.to(dtype)


def _nf4_kernels() -> None:
    """Register the operators of bitsandbytes. Raises UserError if it is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            "model.quantization: nf4 needs the package bitsandbytes; pip install 'sdft[low_memory]', or choose int8"
        ) from error


def quantize_layers(network: nn.Module, suffixes: Sequence[str], format: Format) -> dict[str, QuantizedLinear]:
    """Replace the linear layers whose names end so by quantised ones without values; name -> new layer."""
    ends = tuple(f".{suffix}" for suffix in suffixes)
    replaced = {}
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Linear) and name.endswith(ends):
            replaced[name] = QuantizedLinear(layer.in_features, layer.out_features, layer.bias, format)
            network.set_submodule(name, replaced[name])
    return replaced


def quantized_layers(network: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The quantised layers of a network by name."""
    return ((name, layer) for name, layer in network.named_modules() if isinstance(layer, QuantizedLinear))


def num_weights(model: nn.Module) -> Callable[[str, nn.Parameter], int]:
    """A function of a parameter's name and value: how many weights it stands for. Scales stand for none."""
    packed = {}
    for name, layer in quantized_layers(model):
        packed[f"{name}.codes"] = layer.in_features * layer.out_features
        packed[f"{name}.scales"] = 0
    return lambda name, parameter: packed.get(name, parameter.numel())
