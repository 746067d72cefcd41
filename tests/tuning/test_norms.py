"""Norms and biases that train beside an adapter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from sdft.errors import UserError
from sdft.formats.adapter import lora_from_model, write_lora
from sdft.formats.lora_file import write_lora_file
from sdft.formats.lora_layer import Layer, LoraFile
from sdft.models.quantized import QuantizedLinear, quantize
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.optimizers.optimizers import adamw
from sdft.optimizers.schedules import constant
from sdft.tuning.adapter import Adapter
from sdft.tuning.norms import restored, unfreeze
from sdft.tuning.parameters import trainable_parameters


def test_norms_and_biases_get_no_weight_decay(tiny_model: Callable) -> None:
    model, tuning = tiny_model(), Adapter(rank=2, train_norms=True, train_biases=True)
    tuning.attach(model)
    plain = {id(p) for group in tuning.groups(model) if group.get("weight_decay") == 0 for p in group["params"]}
    assert plain == {id(p) for name, p in model.named_parameters() if name in tuning.initial}
    assert len(plain) == len(tuning.initial) > 0


NORMS_OF_THE_MIDDLE = ("attentions.0.norm", *(f"resnets.{i}.norm{j}" for i in (0, 1) for j in (1, 2)))


def test_norms_may_be_chosen(tiny_model: Callable) -> None:
    model, tuning = (
        tiny_model(),
        Adapter(rank=2, train_norms=True, include=["unet.mid_block.*"], exclude=["*.transformer_blocks.*"]),
    )
    tuning.attach(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name}
    assert tuning.initial.keys() == trained
    names = {name.rpartition(".")[0] for name in trained}
    assert names == {f"unet.mid_block.{name}" for name in NORMS_OF_THE_MIDDLE}
    with pytest.raises(UserError, match=r"tuning\.train_norms=true: tuning\.include and tuning\.exclude leave no norm"):
        Adapter(rank=2, train_norms=True, include=["*.to_q"]).attach(tiny_model())


def test_restored_gives_the_initial_bits_and_the_trained_ones_back(tiny_model: Callable) -> None:
    model = tiny_model()
    Adapter(rank=2).attach(model)
    initial = unfreeze(model, ["unet"], norms=True, biases=True)
    p = model.unet.conv_norm_out.weight
    with torch.no_grad():
        p.mul_(1.1)
    trained = p.detach().clone()
    with restored(model, initial):
        assert torch.equal(p, initial["unet.conv_norm_out.weight"])
    assert torch.equal(p, trained)
    with pytest.raises(ZeroDivisionError), restored(model, initial):
        1 / 0  # noqa: B018
    assert torch.equal(p, trained)
    assert p.requires_grad


def test_a_norm_before_which_nothing_learns_has_gradients(tiny_model: Callable) -> None:
    """torch crashes there on a CPU if the input is channels_last; the gradient is the same in both formats."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = tiny_model()
        unfreeze(model, ["unet"], norms=True, biases=False)
        x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0)).to(memory_format=layout)
        norm = model.unet.down_blocks[0].resnets[0].norm1
        norm(x).square().sum().backward()
        found.append(norm.weight.grad)
        assert not x.requires_grad
    torch.testing.assert_close(found[0], found[1])


def test_biases_beside_quantised_weights_have_gradients() -> None:
    plain = nn.Linear(8, 6)
    layer = QuantizedLinear(8, 6, nn.Parameter(plain.bias.detach().clone()), "int8")
    layer.codes, layer.scales = (nn.Parameter(t, requires_grad=False) for t in quantize(plain.weight.detach(), "int8"))
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    for one in (plain, layer):
        one(x).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


@pytest.mark.parametrize(("dtype", "refused"), [(torch.float16, True), (torch.bfloat16, False)])
def test_norms_in_half_precision(dtype: torch.dtype, refused: bool, tiny_model: Callable) -> None:
    """bf16 is rounded stochastically, one parameter at a time; in fp16 small updates would be lost."""
    model = tiny_model()
    model.unet.to(dtype)
    build = partial(adamw, lr=1e-3)
    options = {"objective": Denoising(), "optimizer": build, "lr_schedule": constant, "seed": 0}
    if refused:
        with pytest.raises(UserError, match=r"model\.dtype\.unet is torch\.float16, in which small updates are lost"):
            Finetuning(model, Adapter(rank=2, train_norms=True), **options)
        return
    module = Finetuning(model, Adapter(rank=2, train_norms=True), **options)
    assert module.updates_parameterwise()
    assert {"lora" in name: p.dtype for name, p in trainable_parameters(model)} == {True: torch.float32, False: dtype}


OPTIONS = {
    "norms": {"rank": 2, "train_norms": True, "train_biases": True},
    "oft": {"rank": 4, "method": "oft", "train_norms": True},
    "boft": {"rank": 6, "method": "boft"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_training_goes_on_from_a_file(name: str, tiny_model: Callable, tmp_path: Path) -> None:
    """At the change of the file, which is a change of the base and stays in what is exported."""
    models = []
    for start in (None, tmp_path / "x.safetensors"):
        model, tuning = tiny_model(), Adapter(**OPTIONS[name], start=None if start is None else str(start))
        tuning.attach(model)
        if start is None:
            with torch.no_grad():
                for _, p in trainable_parameters(model):
                    p.add_(0.1)
            write_lora(model, tmp_path / "x.safetensors", torch.float32, "kohya", initial=tuning.initial)
        models.append((model, lora_from_model(model, tuning.initial)))
    (one, first), (other, second) = models
    for (key, a), (_, b) in zip(trainable_parameters(one), trainable_parameters(other), strict=True):
        assert torch.allclose(a, b, atol=1e-6), key
    assert first.vectors.keys() == second.vectors.keys()
    assert all(torch.allclose(change, second.vectors[weight]) for weight, change in first.vectors.items())


def test_a_start_that_cannot_go_on_is_refused(tiny_model: Callable, tmp_path: Path) -> None:
    tuning, model, file = Adapter(**OPTIONS["norms"]), tiny_model(), tmp_path / "x.safetensors"
    tuning.attach(model)
    write_lora(model, file, layout="kohya", initial=tuning.initial)
    message = r"tuning\.start=.*: has a change of unet/.*, which does not train here; set tuning\.train_{}=true"
    for trained, lacking in ({"train_biases": True}, "norms"), ({"train_norms": True}, "biases"):
        with pytest.raises(UserError, match=message.format(lacking)):
            Adapter(rank=2, start=str(file), **trained).attach(tiny_model())
    layer = "unet/mid_block.attentions.0.proj_in"
    write_lora_file(LoraFile({layer: Layer({"oft_blocks": torch.zeros(2, 12, 12)}, 0.0)}), file, "kohya")
    with pytest.raises(UserError, match=r"oft_blocks of unet.mid.* is \[2, 12, 12\] in the file, and \[6, 4, 4\] here"):
        Adapter(rank=12, method="oft", start=str(file)).attach(tiny_model())


def test_a_bound_goes_on_too(tiny_model: Callable, tmp_path: Path) -> None:
    file, layer = tmp_path / "x.safetensors", "unet/mid_block.attentions.0.proj_in"
    write_lora_file(LoraFile({layer: Layer({"oft_blocks": torch.ones(6, 4, 4)}, 0.5)}), file, "kohya")
    model = tiny_model()
    Adapter(rank=2, method="oft", start=str(file)).attach(model)
    assert lora_from_model(model).layers[layer].alpha == 0.5
