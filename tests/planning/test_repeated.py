"""Tracing one block of a kind forecasts what tracing all of them does."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
from checks import slow

from sdft.data.datamodule import Images
from sdft.models.load import pretrained_on_meta
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.optimizers.optimizers import adafactor, adamw
from sdft.optimizers.schedules import constant
from sdft.planning import repeated
from sdft.planning.footprint import MetaBuild, Setup, Traces, trace
from sdft.planning.repeated import repeated_blocks
from sdft.planning.updates import optimizer_memory
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full

CPU = Setup(max_steps=10, accumulate=1, precision="32-true", num_devices=1, num_shards=1, on_gpu=False)
GPU = replace(CPU, precision="bf16-mixed", on_gpu=True, num_drawn=2, drawn_side=64)


def test_the_transformer_blocks_of_all_parts_are_found(thin_sdxl) -> None:
    model = pretrained_on_meta(str(thin_sdxl.weights), str(thin_sdxl.config))
    kinds = Counter(type(block).__name__ for block in repeated_blocks(model))
    assert kinds == {
        "BasicTransformerBlock": 70,
        "ResnetBlock2D": 17 + 24,
        "CLIPEncoderLayer": 44,
        "CLIPTextEmbeddings": 2,
    }


def traces(monkeypatch, model, tiny_source, kind: str, setup: Setup, checkpointing: bool, every_block: bool) -> Traces:
    """Of one batch, with stand-ins for all but one block of a kind, or with every block."""
    data = Images(tiny_source(6), tiny_source(2, "held out"), 2, size=64, cache="ram")
    with MetaBuild():
        if checkpointing:
            model.unet.enable_gradient_checkpointing()
        tuning = Adapter(rank=2) if kind == "lora" else Full()
        build = partial(adafactor if kind == "fused" else adamw, lr=1e-3)
        module = Finetuning(model, tuning, Denoising(), build, constant, seed=0, fused_backward=kind == "fused")
    updates = optimizer_memory(module, setup.on_gpu).updates
    with monkeypatch.context() as patch:
        if every_block:
            patch.setattr(repeated, "repeated_blocks", lambda model: set())
        return trace(module, data, setup, updates if kind == "fused" else {})


def compare(once: Traces, every: Traces, exact: float) -> None:
    """Bytes of all stages, and FLOPs to 3 %: a checkpoint stops to run a block again before its last operations."""
    assert once.step == pytest.approx(every.step, rel=exact)
    assert once.flops == pytest.approx(every.flops, rel=0.03)
    assert once.denoise == pytest.approx(every.denoise, rel=exact)
    assert (once.encode, once.decode) == (every.encode, every.decode)


@pytest.mark.parametrize(
    ("kind", "setup", "checkpointing"),
    [
        ("lora", GPU, True),
        ("fused", GPU, False),
        slow("lora", CPU, False),
        slow("lora", GPU, False),
        slow("full", CPU, True),
        slow("full", GPU, True),
        slow("full", GPU, False),
        slow("fused", GPU, True),
    ],
)
def test_one_block_of_a_kind_is_enough(kind, setup, checkpointing, tiny_model, tiny_source, monkeypatch) -> None:
    def deep():
        model = tiny_model()
        model.unet = type(model.unet).from_config({**model.unet.config, "transformer_layers_per_block": 3})
        return model.to("meta")

    once, every = (traces(monkeypatch, deep(), tiny_source, kind, setup, checkpointing, flag) for flag in (False, True))
    compare(once, every, exact=0.05)  # a stand-in holds its input a little longer, which is 5 % of so small a model


@pytest.mark.slow
def test_also_for_the_topology_of_sdxl(thin_sdxl, tiny_source, monkeypatch) -> None:
    once, every = (
        traces(
            monkeypatch,
            pretrained_on_meta(str(thin_sdxl.weights), str(thin_sdxl.config)),
            tiny_source,
            kind="lora",
            setup=GPU,
            checkpointing=True,
            every_block=flag,
        )
        for flag in (False, True)
    )
    compare(once, every, exact=0.01)
