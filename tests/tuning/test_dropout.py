"""Adapter dropout: a sample's mask depends on nothing but the seed, the sample, its visit and the layer."""

from __future__ import annotations

from dataclasses import fields
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from sdft.batch import Batch
from sdft.errors import UserError
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.optimizers.optimizers import adamw
from sdft.optimizers.schedules import constant
from sdft.rng import Draws, seed_of
from sdft.tuning.adapter import Adapter
from sdft.tuning.dropout import SampleDropout, SampleSeeds, mix, signed
from sdft.tuning.parameters import trainable_parameters

ALL_PARTS = ("unet", "text_encoder", "text_encoder_2")


def masks(p: float, shape: tuple[int, ...], seed: int = 0, layer: str = "a", keys="xyz", visits=(0, 0, 0)) -> Tensor:
    """The output for an input of ones."""
    seeds = SampleSeeds()
    seeds.set(Draws(seed, list(keys), list(visits)), torch.device("cpu"))
    return SampleDropout(p, layer, seeds).train()(torch.ones(shape))


def rows(batch: Batch, chosen: slice) -> Batch:
    """Some of the samples of a batch."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return Batch(**{name: None if value is None else value[chosen] for name, value in values.items()})


def module_with(model, dropout: float, **options) -> Finetuning:
    adapter = Adapter(rank=2, dropout=dropout, **options)
    module = Finetuning(model, adapter, Denoising(), partial(adamw, lr=1e-2), constant, seed=3)
    torch.manual_seed(1)
    for _, parameter in trainable_parameters(module.model):
        nn.init.normal_(parameter, std=0.3)
    return module


def gradients(module: Finetuning, batch: Batch, layout: tuple[int, ...]) -> tuple[float, dict[str, Tensor]]:
    """Mean loss and gradients of a batch that is cut into micro-batches of these sizes."""
    module.zero_grad()
    torch.manual_seed(sum(layout) + len(layout))  # the global generator has no influence
    total, start = 0.0, 0
    for num in layout:
        loss = module.training_step(rows(batch, slice(start, start + num)), 0) * num / sum(layout)
        loss.backward()
        total, start = total + loss.item(), start + num
    return total, {name: p.grad.clone() for name, p in trainable_parameters(module.model)}


def test_masks_are_murmur_hashes_by_hand() -> None:
    """Against the same arithmetic on Python's integers."""

    def by_hand(h: int) -> int:
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    words = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 0xDEADBEEF]
    given = torch.tensor([signed(word) for word in words], dtype=torch.int32)
    assert [h % 2**32 for h in mix(given).tolist()] == [by_hand(word) for word in words]

    sample, layer = seed_of(5, "dropout", "y", 2), seed_of(0, "dropout layer", "unet.a")
    low, high = (sample ^ layer) % 2**32, (sample ^ layer) >> 32
    kept = [signed(by_hand(by_hand(i ^ low) ^ high)) >= 0.25 * 2**32 - 2**31 for i in range(40)]
    found = masks(0.25, (2, 8, 5), seed=5, layer="unet.a", keys="xy", visits=(0, 2))[1].flatten()
    torch.testing.assert_close(found, torch.tensor(kept) / 0.75)


def test_masks_of_samples_visits_layers_and_seeds_are_independent() -> None:
    """Of 100 000 elements, p are zero, p^2 in each pair, and the mean is kept; five sigma of tolerance."""
    p, num = 0.3, 100_000
    batch = masks(p, (3, num))
    others = (masks(p, (3, num), **change)[:1] for change in ({"seed": 1}, {"layer": "b"}, {"visits": (1, 0, 0)}))
    dropped = torch.cat([batch, *others]) == 0
    share = dropped.double() @ dropped.double().T / num
    expected = torch.full((6, 6), p * p, dtype=torch.float64).fill_diagonal_(p)
    tolerance = 5 * (expected * (1 - expected) / num).sqrt()
    assert ((share - expected).abs() < tolerance).all()
    shifted = (dropped[0, 1:] & dropped[0, :-1]).double().mean()
    assert abs(shifted - p * p) < 5 * (p * p / num) ** 0.5
    torch.testing.assert_close(batch.mean(), torch.tensor(1.0), rtol=0, atol=5 * (p / (1 - p) / num / 3) ** 0.5)


def test_a_mask_does_not_depend_on_the_batch() -> None:
    whole = masks(0.5, (3, 4, 6))
    assert torch.equal(masks(0.5, (1, 4, 6), keys="y", visits=(0,))[0], whole[1])
    # Two chunks of a long prompt are two rows of one sample.
    chunks = masks(0.5, (6, 2, 6))
    assert torch.equal(chunks.view(3, 4, 6), whole)
    with pytest.raises(RuntimeError, match="4 rows, but seeds of 3 samples"):
        masks(0.5, (4, 6))


@pytest.mark.parametrize("options", [{"parts": ALL_PARTS}, {"method": "dora", "layers": "conv"}], ids=["lora", "dora"])
def test_micro_batches_of_any_size_are_the_same_step(options: dict, tiny_model, tiny_batch) -> None:
    """1 x 4, 2 x 2 and 4 x 1 give the same loss and gradients up to float rounding, and dropout is on."""
    module, batch = module_with(tiny_model(), 0.4, **options), tiny_batch(num=4, visits=[0, 1, 2, 3])
    loss, whole = gradients(module, batch, (4,))
    scale = max(float(g.abs().max()) for g in whole.values())
    for layout in ((2, 2), (1, 1, 1, 1), (3, 1)):
        again, parts = gradients(module, batch, layout)
        assert again == pytest.approx(loss, rel=1e-5)
        for name, gradient in whole.items():
            assert (parts[name] - gradient).norm() < 1e-3 * gradient.norm() + 1e-6 * scale, name
    without, _ = gradients(module_with(tiny_model(), 0.0, **options), batch, (4,))
    assert abs(without - loss) > 1e-3 * loss


def test_gradient_checkpointing_recomputes_the_same_masks(tiny_model, tiny_batch) -> None:
    batch = tiny_batch(num=2)
    plain, checkpointed = (module_with(tiny_model(), 0.4) for _ in range(2))
    checkpointed.model.unet.enable_gradient_checkpointing()
    loss, expected = gradients(plain, batch, (2,))
    again, found = gradients(checkpointed, batch, (2,))
    assert again == loss
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_a_compiled_layer_uses_the_seeds_of_each_batch() -> None:
    seeds = SampleSeeds()
    layer = SampleDropout(0.5, "a", seeds).train()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x, outputs = torch.ones(2, 50), []
    for visit in range(2):
        seeds.set(Draws(0, ["x", "y"], [visit, visit]), torch.device("cpu"))
        outputs.append(compiled(x))
        assert torch.equal(outputs[-1], layer(x))
    assert not torch.equal(*outputs)


def test_only_training_drops(tiny_model, tiny_batch) -> None:
    """In evaluation the adapter is whole; without dropout there is no layer of ours in the model."""
    model = tiny_model()
    adapter = Adapter(rank=2, dropout=0.4)
    adapter.attach(model)
    layers = [module for module in model.modules() if isinstance(module, SampleDropout)]
    assert layers
    assert not any(isinstance(module, nn.Dropout) and module.p for module in model.modules())
    x = torch.randn(3, 5)
    assert torch.equal(layers[0].eval()(x), x)
    with pytest.raises(RuntimeError, match="seeds of 0 samples"):
        layers[0].train()(x)
    plain = tiny_model()
    Adapter(rank=2).attach(plain)
    assert not any(isinstance(module, SampleDropout) for module in plain.modules())
    with pytest.raises(UserError, match=r"tuning\.dropout=0\.1: is not defined for tuning\.method=loha"):
        Adapter(rank=2, method="loha", dropout=0.1)
