"""OFT and BOFT: the rotations by hand, their blocks, and layers of every kind with them."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from sdft.errors import UserError
from sdft.formats.rotation import RotatedLayer, rotation_change
from sdft.models.quantized import QuantizedLinear, quantize
from sdft.tuning.adapter import Adapter, adapters, scaled
from sdft.tuning.parameters import trainable_parameters
from sdft.tuning.rotation import block_shape


def random(*shape: int, seed: int = 0, scale: float = 0.5) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_block_of_two_turns_by_twice_the_arctangent() -> None:
    """B - B^T = [[0, q], [-q, 0]]; Cayley's R turns by 2 atan(q): for q = 1/2 it is [[3, 4], [-4, 3]] / 5."""
    blocks = torch.tensor([[[9.0, 0.7], [0.2, -4.0]]])  # the diagonal cancels
    y = torch.tensor([[10.0], [5.0]])
    turned = torch.tensor([[3 * 10 - 4 * 5], [4 * 10 + 3 * 5]]) / 5  # R^T y
    torch.testing.assert_close(y + rotation_change(y, blocks), turned)
    torch.testing.assert_close(y + rotation_change(y, blocks, strength=0.25), y + 0.25 * (turned - y))
    factor = torch.tensor([[2.0], [3.0]])
    torch.testing.assert_close(y + rotation_change(y, blocks, factor), factor * turned)


def test_a_bound_shrinks_q() -> None:
    """|Q| = sqrt(2) q; at alpha x channels = sqrt(2) / 8 it is shrunk from q = 1/2 to 1/8."""
    y, small = torch.tensor([[10.0], [5.0]]), torch.tensor([[[0.0, 0.125], [0.0, 0.0]]])
    found = rotation_change(y, 4 * small, alpha=math.sqrt(2) / 16)
    torch.testing.assert_close(found, rotation_change(y, small))
    torch.testing.assert_close(rotation_change(y, small, alpha=1.0), rotation_change(y, small))


def test_a_butterfly_of_two_rotations() -> None:
    """4 channels, blocks of 2. The first rotation takes channels (0, 1), (2, 3), the second (0, 2), (1, 3)."""
    blocks = torch.zeros(2, 2, 2, 2)
    blocks[0, 0, 0, 1] = blocks[1, 1, 0, 1] = 0.5
    y = torch.tensor([10.0, 5.0, 1.0, 2.0])[:, None]
    first = [(3 * 10 + 4 * 5) / 5, (-4 * 10 + 3 * 5) / 5, 1.0, 2.0]  # R y, not R^T y
    second = [first[0], (3 * first[1] + 4 * first[3]) / 5, 1.0, (-4 * first[1] + 3 * first[3]) / 5]
    torch.testing.assert_close((y + rotation_change(y, blocks)).flatten(), torch.tensor(second))


@pytest.mark.parametrize(("method", "rows", "rank"), [("oft", 24, 4), ("boft", 24, 6), ("boft", 16, 2)])
def test_what_is_trained_is_orthogonal(method: str, rows: int, rank: int) -> None:
    """So lengths and angles between rows stay; with BOFT every channel reaches every other."""
    blocks = random(*block_shape(method, rows, rank, "x"))
    matrix = torch.eye(rows) + rotation_change(torch.eye(rows), blocks)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(rows), atol=1e-5, rtol=0)
    assert (method == "boft") == bool((matrix != 0).all())
    assert torch.equal(rotation_change(torch.eye(rows), torch.zeros_like(blocks)), torch.zeros(rows, rows))


@pytest.mark.parametrize(
    ("method", "rows", "rank", "shape"),
    [
        ("oft", 640, 16, (40, 16, 16)),
        ("oft", 640, 30, (32, 20, 20)),  # at most as large as there are blocks
        ("oft", 640, 7, (128, 5, 5)),
        ("boft", 640, 16, (7, 64, 10, 10)),  # 2^6 blocks of 10
        ("boft", 640, 40, (5, 16, 40, 40)),
        ("boft", 4, 8, (1, 1, 4, 4)),
    ],
)
def test_the_blocks_of_a_layer(method: str, rows: int, rank: int, shape: tuple[int, ...]) -> None:
    assert block_shape(method, rows, rank, "x") == shape


def test_blocks_that_are_not_possible_are_refused_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"tuning.rank=8: boft cannot cut the 640 outputs of x .*; set rank=10 or more"):
        block_shape("boft", 640, 8, "x")
    with pytest.raises(UserError, match=r"boft cannot cut the 7 outputs of x .*; leave it out with tuning.exclude"):
        block_shape("boft", 7, 8, "x")
    with pytest.raises(UserError, match=r"tuning.rank=8: oft cannot cut the 13 outputs of x into blocks of 2 or more"):
        block_shape("oft", 13, 8, "x")


@pytest.mark.parametrize("method", ["oft", "boft"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("alpha", 4.0), ("conv_alpha", 2.0), ("alpha_pattern", {"unet.*": 1.0}), ("rslora", True)),
        *(("dropout", 0.1), ("rank_dropout", 0.1), ("module_dropout", 0.1)),
        *(("init", "pissa"), ("lora_plus", 4.0), ("max_norm", 1.0)),
    ],
)
def test_options_of_factors_are_refused(method: str, option: str, value: Any) -> None:
    message = rf"^tuning\.{option}={re.escape(str(value))}: is not defined for tuning.method={method}; remove it"
    with pytest.raises(UserError, match=message):
        Adapter(rank=6, method=method, layers="conv", **{option: value})


LAYERS = {
    "linear": (partial(nn.Linear, 6, 12), (3, 5, 6)),
    "no bias": (partial(nn.Linear, 6, 12, bias=False), (3, 6)),
    "convolution": (partial(nn.Conv2d, 4, 12, 3, stride=2, padding=1), (2, 4, 7, 9)),
}


@pytest.mark.parametrize("method", ["oft", "boft"])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_are_those_of_the_rotated_weight(kind: str, method: str) -> None:
    build, shape = LAYERS[kind]
    layer, x = build(), random(*shape, scale=1)
    rotated = RotatedLayer(layer, block_shape(method, 12, 6, "x"))
    assert torch.equal(rotated(x), layer(x))
    nn.init.normal_(rotated.oft_blocks["default"])
    expected = build()
    with torch.no_grad():
        expected.weight.copy_(layer.weight + rotation_change(layer.weight, rotated.oft_blocks["default"]))
        if layer.bias is not None:
            expected.bias.copy_(layer.bias)
    torch.testing.assert_close(rotated(x), expected(x), atol=1e-5, rtol=1e-5)
    rotated.enable_adapters(False)
    assert torch.equal(rotated(x), layer(x))


def test_gradients_are_those_of_finite_differences() -> None:
    y = random(12, 2).double()
    for method in ("oft", "boft"):
        blocks = random(*block_shape(method, 12, 6, "x"), seed=1).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda b: rotation_change(y, b), blocks)


def test_a_quantised_base_is_rotated_too() -> None:
    plain = nn.Linear(8, 12)
    layer = QuantizedLinear(8, 12, plain.bias, "int8")
    codes, scales = quantize(plain.weight.detach(), "int8")
    layer.codes, layer.scales = (nn.Parameter(t, requires_grad=False) for t in (codes, scales))
    rotated, x = RotatedLayer(layer, block_shape("oft", 12, 3, "x")), random(4, 8, scale=1)
    nn.init.normal_(rotated.oft_blocks["default"])
    weight = layer.weight + rotation_change(layer.weight, rotated.oft_blocks["default"])
    torch.testing.assert_close(rotated(x), nn.functional.linear(x, weight, plain.bias), atol=1e-5, rtol=1e-5)
    rotated(x).square().sum().backward()
    assert rotated.oft_blocks["default"].grad.abs().max() > 0


def test_under_autocast_the_rotation_itself_is_fp32() -> None:
    """A small angle would be lost in a matrix of bf16 near the identity."""
    layer = nn.Linear(8, 8, bias=False)
    rotated, x = RotatedLayer(layer, block_shape("oft", 8, 2, "x")), random(4, 8, scale=1)
    with torch.no_grad():
        rotated.oft_blocks["default"].copy_(random(4, 2, 2, scale=1e-4))
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            change = rotation_change(y, rotated.oft_blocks["default"], axis=1)
        expected = rotation_change(y.float(), rotated.oft_blocks["default"], axis=1)
    assert change.dtype == torch.bfloat16
    torch.testing.assert_close(change.float(), expected, rtol=0.02, atol=1e-7)


def test_strength_of_a_model(tiny_model) -> None:
    model = tiny_model()
    Adapter(rank=4, method="oft").attach(model)
    for _, p in trainable_parameters(model):
        nn.init.normal_(p)
    layer = model.unet.mid_block.attentions[0].proj_in
    x = random(4, layer.base_layer.in_features)
    base, turned = layer.base_layer(x), layer(x)
    with scaled(model, 0.5):
        torch.testing.assert_close(layer(x), (base + turned) / 2)
    assert torch.equal(layer(x), turned)
    assert all(layer.oft_blocks["default"].dtype == torch.float32 for layer in adapters(model))
