"""Blocks whose weights stay on the host: the same numbers, on the right devices, and refusals."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdft.batch import Conditioning
from sdft.distributed.sharding import clip_gradients
from sdft.errors import UserError
from sdft.models.load import pretrained
from sdft.models.streaming import BlockStream, on_host, streams
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.optimizers.optimizers import adamw
from sdft.optimizers.schedules import constant
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full

TUNINGS = {"lora": partial(Adapter, rank=4), "dora": partial(Adapter, rank=4, method="dora"), "full": Full}
NUM_BLOCKS = 11


def model_with(num_streamed: Any, tuning: str = "lora", quantization: Any = None):
    model = pretrained("nano", gradient_checkpointing=True, quantization=quantization, offload_blocks=num_streamed)
    torch.manual_seed(0)
    TUNINGS[tuning]().attach(model)
    return model.train()


def inputs(model, device: str = "cpu") -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, model.latent_channels, 8, 8, generator=generator).to(device)
    with torch.no_grad():
        context, pooled = model.encode_prompts(["a cat", "a red car"])
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2, device=device)
    return z, torch.tensor([3, 700], device=device), Conditioning(context.to(device), pooled.to(device), sizes)


def learned(model, num_batches: int = 2) -> tuple[Tensor, Tensor]:
    """(prediction, gradients) of a few batches, added up."""
    for _ in range(num_batches):
        prediction = model.denoise(*inputs(model))
        prediction.square().mean().backward()
    return prediction.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("tuning", "quantization"),
    [("lora", None), ("dora", None), ("full", None), ("lora", {"unet": "int8"})],
    ids=["lora", "dora", "full", "int8"],
)
def test_predictions_and_gradients_are_the_same_bits(tuning: str, quantization: Any) -> None:
    expected = learned(model_with(0, tuning, quantization))
    for count in (1, 4, "all"):
        model = model_with(count, tuning, quantization)
        found = learned(model)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), count
        with torch.no_grad():
            drawn = [m.denoise(*inputs(m)) for m in (model, model_with(0, tuning, quantization))]
        assert torch.equal(*drawn)


class OneDevice(TorchDispatchMode):
    """Raises where an operation other than a copy mixes tensors of the CPU and of `meta`, which stands for a GPU."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.ndim]
        to_host = torch.device((kwargs or {}).get("device") or "meta").type == "cpu"
        if function is torch.ops.aten._to_copy.default and to_host and args[0].is_meta:
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        if "copy" not in str(function) and len({t.device for t in tensors}) > 1:
            raise AssertionError(f"{function} mixes {[(t.shape, t.device) for t in tensors]}")
        return function(*args, **(kwargs or {}))


def step_on_meta(model) -> None:
    with OneDevice():
        model.denoise(*inputs(model, "meta")).square().mean().backward()


@pytest.mark.parametrize(
    ("tuning", "quantization"),
    [("lora", None), ("full", None), ("lora", {"unet": "int8"})],
    ids=["lora", "full", "int8"],
)
def test_weights_stay_on_the_host_and_nothing_is_computed_there(
    tuning: str, quantization: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which knows no `meta`
    model = model_with("all", tuning, quantization)
    hosted = on_host(model)
    model.to("meta")
    assert on_host(model) == hosted
    assert {p.device.type for p in hosted} == {"cpu"}
    assert {p.device.type for p in model.parameters() if p not in hosted} == {"meta"}
    step_on_meta(model)
    gradients = {(p.device.type, p.grad.device.type) for p in model.parameters() if p.grad is not None}
    assert gradients == ({("cpu", "cpu"), ("meta", "meta")} if tuning == "full" else {("meta", "meta")})
    trained = [p for p in model.parameters() if p.requires_grad]
    with OneDevice():
        clip_gradients(trained, 1.0)
        optimizer = adamw([{"params": trained, "lr": 1e-3}], lr=1e-3)
        optimizer.step()
    assert all(optimizer.state[p]["exp_avg"].device == p.device for p in trained if p.grad is not None)
    model.to(torch.float64)
    assert {p.dtype for p in hosted if p.is_floating_point()} == {torch.float64}
    assert {p.device.type for p in hosted} == {"cpu"}


def test_the_check_above_finds_a_weight_that_stays_behind() -> None:
    model = model_with(0).to("meta")
    layer = model.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.base_layer
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape), requires_grad=False)
    with pytest.raises(AssertionError, match="mixes"):
        step_on_meta(model)


def test_a_copy_of_a_network_has_weights_of_its_own() -> None:
    model = model_with("all")
    before = learned(model, 1)[0]
    copied = copy.deepcopy(model)
    assert not on_host(copied) & on_host(model)
    with torch.no_grad():
        for p in on_host(copied):
            p.zero_()
    assert not torch.equal(learned(copied, 1)[0], before)
    assert torch.equal(learned(model, 1)[0], before)


def test_weights_that_change_are_copied_again() -> None:
    """In place, as by loading a checkpoint, or by new memory for the parameter."""
    model = model_with("all")
    with torch.no_grad():
        before = model.denoise(*inputs(model))
        for p in on_host(model):
            p.mul_(1.5)
        assert not torch.equal(model.denoise(*inputs(model)), before)
        for p in on_host(model):
            p.data = p.data / 1.5
        torch.testing.assert_close(model.denoise(*inputs(model)), before)


def test_without_checkpoints_autograd_refuses_the_weights_of_another_block() -> None:
    """Slots are written over; nothing learns from what is in them then."""
    model = model_with("all")
    model.unet.disable_gradient_checkpointing()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        learned(model)


class Counted(BlockStream):
    """Counts the copies of blocks, and how many of them were begun while another block was current."""

    filled = 0
    ahead = 0

    def _fetch_ahead(self, index: int, device: torch.device) -> None:
        before = Counted.filled
        super()._fetch_ahead(index, device)
        Counted.ahead += Counted.filled - before

    @staticmethod
    def _fill(*args: Any) -> None:
        Counted.filled += 1
        BlockStream._fill(*args)


def test_a_block_is_copied_once_for_each_pass_and_ahead_of_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdft.models.streaming.BlockStream", Counted)
    model = model_with("all")
    learned(model, num_batches=2)
    Counted.filled = Counted.ahead = 0
    learned(model, num_batches=1)
    # Of two passes over 11 blocks, the turns at both ends need no copy.
    assert Counted.filled == Counted.ahead == 2 * NUM_BLOCKS - 4


@pytest.mark.parametrize("count", [1, 3, NUM_BLOCKS])
def test_streamed_blocks_are_spread_evenly(count: int) -> None:
    model = pretrained("nano", gradient_checkpointing=True, offload_blocks=count)
    blocks = [m for m in model.unet.modules() if type(m).__name__ == "BasicTransformerBlock"]
    chosen = [i for i, block in enumerate(blocks) if "stream" in block.__dict__]
    assert len(blocks) == NUM_BLOCKS
    assert len(chosen) == count
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    (stream,) = streams(model)
    assert len(stream.places) == count


def test_too_many_blocks_and_missing_checkpoints_are_refused() -> None:
    with pytest.raises(UserError, match=r"model.offload_blocks=12: there are 11 transformer blocks"):
        pretrained("nano", gradient_checkpointing=True, offload_blocks=12)
    with pytest.raises(UserError, match=r"gradient_checkpointing=true"):
        pretrained("nano", offload_blocks="all")
    with pytest.raises(UserError, match=r"compile=false"):
        pretrained("nano", gradient_checkpointing=True, compile="blocks", offload_blocks=2)


def test_several_devices_are_refused() -> None:
    model = pretrained("nano", gradient_checkpointing=True, offload_blocks="all")
    module = Finetuning(model, Adapter(rank=2), Denoising(), partial(adamw, lr=1e-3), constant, seed=0)
    module._trainer = SimpleNamespace(world_size=2)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"model.offload_blocks: .* set it to 0"):
        module.configure_model()
