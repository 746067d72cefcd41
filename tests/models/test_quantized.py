"""Frozen layers in 8 and 4 bits: their values, their products, training beside them, and what the export reports."""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from checks import long, slow, trained_module
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.synthetic import Synthetic
from sdft.config.command import compose
from sdft.data.datamodule import Images
from sdft.errors import UserError
from sdft.evaluation.export_check import quantization_errors
from sdft.models.load import pretrained, pretrained_on_meta
from sdft.models.quantized import FORMATS, QuantizedLinear, dequantize, num_weights, quantize, quantized_layers
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.optimizers.optimizers import adamw
from sdft.optimizers.schedules import constant
from sdft.planning.allocations import AllocationTracker
from sdft.planning.footprint import MetaBuild, Setup, memory_needs
from sdft.rng import Draws
from sdft.training.callbacks.export import Export
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full
from sdft.tuning.parameters import trainable_parameters

ERRORS = {"int8": (0.004, 0.012), "fp8": (0.01, 0.035), "nf4": (0.05, 0.12)}
"""Least and largest relative error of normally distributed weights."""


def weights(rows: int = 48, columns: int = 128) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def layer(format: str, source: nn.Linear) -> QuantizedLinear:
    made = QuantizedLinear(source.in_features, source.out_features, source.bias, format)
    codes, scales = quantize(source.weight.detach(), format)
    made.load_state_dict({"codes": codes, "scales": scales, "bias": source.bias}, assign=True)
    return made


def test_int8_by_hand_and_as_bitsandbytes_does_it() -> None:
    codes, scales = quantize(torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0]]), "int8")
    assert codes.tolist() == [[127, -50, 0], [0, 0, 0]]
    assert scales[0].item() == pytest.approx(0.01)
    assert dequantize(codes, scales, "int8", (2, 3), torch.float32)[0, 1].item() == pytest.approx(-0.5)
    theirs, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(weights())
    ours, scales = quantize(weights(), "int8")
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(scales[:, 0] * 127, largest)


@pytest.mark.parametrize("format", FORMATS)
def test_the_error_of_a_format(format: str) -> None:
    codes, scales = quantize(weights(), format)
    error = (dequantize(codes, scales, format, (48, 128), torch.float32) - weights()).norm() / weights().norm()
    assert ERRORS[format][0] < error < ERRORS[format][1]
    bits = 8 * (codes.nbytes + scales.nbytes) / weights().numel()
    assert bits == pytest.approx({"int8": 8.25, "fp8": 8.25, "nf4": 4.5}[format])
    assert not codes.is_floating_point(), "a cast of the network would change it"


@pytest.mark.parametrize("format", FORMATS)
def test_products_and_gradients_are_those_of_the_dequantised_weight(format: str) -> None:
    source = nn.Linear(128, 48)
    quantized = layer(format, source)
    x = torch.randn(4, 7, 128, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    expected = F.linear(y, quantized.weight, source.bias.detach())
    found = quantized(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_the_dequantised_weight_is_not_kept_for_the_backward_pass() -> None:
    quantized = layer("int8", nn.Linear(512, 512))
    x = torch.randn(1, 512, requires_grad=True)
    with AllocationTracker(quantized) as ledger:
        for _ in range(4):
            x = quantized(x)
    assert ledger.now < 512 * 512, "less than one weight"


def test_it_follows_autocast() -> None:
    quantized = layer("int8", nn.Linear(64, 32))
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantized(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(x.grad, quantized.weight.sum(0).expand(2, -1), rtol=0.05, atol=0.05)


def test_a_cast_of_the_network_leaves_the_codes_alone() -> None:
    for format in FORMATS:
        quantized = layer(format, nn.Linear(64, 32))
        before = quantized.weight
        assert torch.equal(copy.deepcopy(quantized).to(torch.float32).weight, before)


@pytest.mark.parametrize("format", ["int8", slow("fp8"), "nf4"])
def test_loading_quantises_the_blocks_only(format: str, thin_sdxl: Synthetic) -> None:
    source = str(thin_sdxl.weights)
    load = partial(pretrained, source, config=str(thin_sdxl.config))
    model, plain = load(quantization={"unet": format, "text_encoder_2": format}), load()
    names = {name for name, _ in quantized_layers(model)}
    assert len([name for name in names if name.startswith("unet.")]) == 722
    assert len([name for name in names if name.startswith("text_encoder_2.")]) == 32 * 6
    assert all("transformer" in name or "proj_" in name for name in names if name.startswith("unet."))
    one = "unet.mid_block.attentions.0.transformer_blocks.3.ff.net.2"
    expected = plain.get_submodule(one).weight
    error = (model.get_submodule(one).weight - expected).norm() / expected.norm()
    assert ERRORS[format][0] < error < ERRORS[format][1]
    assert torch.equal(model.get_submodule(one).bias, plain.get_submodule(one).bias)
    count, total = num_weights(model), sum(p.numel() for p in plain.parameters())
    assert sum(count(name, p) for name, p in model.named_parameters()) == total
    on_meta = pretrained_on_meta(source, config=str(thin_sdxl.config), quantization={"unet": format})
    shapes = {name: (p.shape, p.dtype) for name, p in on_meta.unet.named_parameters()}
    assert shapes == {name: (p.shape, p.dtype) for name, p in model.unet.named_parameters()}


@pytest.mark.parametrize("format", [slow("int8"), long("nf4")])
def test_the_forecast_of_a_step_is_what_it_takes(format: str, thin_sdxl: Synthetic, tiny_source) -> None:
    """Weights to 1 %, the peak of the step to 10 %, against counted bytes."""
    data = Images(tiny_source(6), tiny_source(2, "held out"), 1, size=64, cache="off")
    options = {"config": str(thin_sdxl.config), "quantization": {"unet": format}}

    def module(model) -> Finetuning:
        return Finetuning(model, Adapter(rank=16), Denoising(), partial(adamw, lr=1e-3), constant, seed=0)

    with MetaBuild():
        planned = module(pretrained_on_meta(str(thin_sdxl.weights), **options))
    setup = Setup(max_steps=10, accumulate=1, precision="32-true", num_devices=1, num_shards=1, on_gpu=False)
    needs = memory_needs(planned, data, setup, 0)
    real, batch = module(pretrained(str(thin_sdxl.weights), **options)), next(iter(data.val_dataloader()))
    held = sum(t.nbytes for t in (*real.model.parameters(), *real.model.buffers()))
    assert needs.weights == pytest.approx(held, rel=0.01)
    batch.keys, batch.visits, batch.captions = batch.keys[:1], batch.visits[:1], batch.captions[:1]
    batch.pixels_BCHW, batch.time_ids_B6 = batch.pixels_BCHW[:1], batch.time_ids_B6[:1]
    batch.dropped_B, batch.loss_weight_B = batch.dropped_B[:1], batch.loss_weight_B[:1]
    for _, p in trainable_parameters(real.model):
        p.grad = torch.zeros_like(p)
    # As the forecast traces it; other tests of this process may have turned the first off.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), AllocationTracker(real.model) as ledger:
        real.objective(real.model, batch, Draws(0, batch.keys, batch.visits)).per_sample_B.mean().backward()
    assert needs.step == pytest.approx(ledger.peak, rel=0.1)


@pytest.mark.parametrize("method", ["lora", long("dora"), slow("loha")])
def test_an_adapter_beside_quantised_layers_is_exported_and_read_back(method: str, thin_sdxl, tmp_path: Path) -> None:
    model = pretrained(str(thin_sdxl.weights), config=str(thin_sdxl.config), quantization={"unet": "nf4"})
    module = trained_module(model, Adapter(4, 4, ["unet"], method=method))
    _, found = Export()(module, tmp_path, "test", 1024)
    errors = {name: value for name, value in found.items() if name.startswith("export_error/")}
    assert 0 < max(errors.values()) < 0.01
    assert found["quantization_error/unet"] > 0


@pytest.mark.parametrize("shape", [(64, 32), (80, 80), (160, 160), (5, 30), (3, 65), (33, 1280)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_are_no_whole_blocks_keep_their_scales(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """bitsandbytes 0.50 mixes the scales of rows up on CPUs with AVX-512: the error was 0.25."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = dequantize(*quantize(weight, "nf4"), "nf4", shape, dtype).float()
    low, high = ERRORS["nf4"]
    assert low < (found - weight).norm() / weight.norm() < high


@pytest.mark.slow
def test_what_quantising_changes_is_reported_relative_to_what_training_did(thin_sdxl: Synthetic) -> None:
    """Four bits change about ten times as much as eight; half the training makes it twice as much relative to it."""
    load = partial(pretrained, str(thin_sdxl.weights), config=str(thin_sdxl.config))
    assert quantization_errors(trained_module(load(), Adapter(4, 4)).model) == {}
    found = {}
    for format, alpha in (("int8", 4), ("nf4", 4), ("nf4", 2)):
        module = trained_module(load(quantization={"unet": format}), Adapter(4, alpha))
        found[format, alpha] = quantization_errors(module.model)["unet"]
    assert 5 < found["nf4", 4] / found["int8", 4] < 20
    assert found["nf4", 2] / found["nf4", 4] == pytest.approx(2, rel=0.02)


def test_what_cannot_be_quantised_is_refused(thin_sdxl: Synthetic, monkeypatch) -> None:
    load = partial(pretrained, str(thin_sdxl.weights), config=str(thin_sdxl.config))
    with pytest.raises(UserError, match=r"model.quantization.vae=int8: it has no linear layers"):
        load(quantization={"vae": "int8"})
    for parts in (["unet"], ["text_encoder"]):
        with pytest.raises(UserError, match=r"model.quantization.unet=int8: quantised weights are frozen"):
            Finetuning(load(quantization={"unet": "int8"}), Full(parts), Denoising(), adamw_of, constant, seed=0)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"nf4 needs the package bitsandbytes; pip install 'sdft\[low_memory\]'"):
        load(quantization={"unet": "nf4"})
    load(quantization={"unet": "int8"})


adamw_of = partial(adamw, lr=1e-3)


def test_presets_of_small_cards_quantise_the_unet_only() -> None:
    for preset, wanted in (("6gb", {"unet": "nf4"}), ("8gb", {"unet": "int8"}), ("12gb", {})):
        assert (
            compose("train", ["model=sdxl", "data=folder", "data.root=x", f"hardware={preset}"]).model.quantization
            == wanted
        )
