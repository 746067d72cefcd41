"""The options of adapters: numbers by hand, and the same as peft where peft has them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from sdft.errors import UserError
from sdft.formats.adapter import applied_lora, lora_from_model, write_lora
from sdft.formats.lora_file import read_lora
from sdft.optimizers.optimizers import adamw, scale_rates
from sdft.rng import Draws
from sdft.tuning.adapter import ADAPTER, Adapter, adapters
from sdft.tuning.dropout import ModuleDropout, RankDropout, SampleSeeds
from sdft.tuning.full import Full
from sdft.tuning.initialization import decomposed
from sdft.tuning.norm_limit import limit_norms, product_norm
from sdft.tuning.parameters import trainable_parameters

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.mid_block.resnets.0.conv1"


def attached(model, **options) -> Adapter:
    tuning = Adapter(**{"rank": 4, **options})
    tuning.attach(model)
    return tuning


def randomise(model) -> None:
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_" in name:
                p.add_(0.05 * torch.randn(p.shape, generator=g))


class TestRanks:
    def test_patterns_by_block_the_last_counts(self, tiny_model) -> None:
        model = tiny_model()
        attached(model, rank_pattern={"unet.mid_block.*": 2, "*.to_q": 3}, alpha_pattern={"*.to_k": 8.0})
        block = model.unet.mid_block.attentions[0].transformer_blocks[0].attn1
        ranks = {name: getattr(block, name).r[ADAPTER] for name in ("to_q", "to_k", "to_v")}
        assert ranks == {"to_q": 3, "to_k": 2, "to_v": 2}
        scales = {name: getattr(block, name).scaling[ADAPTER] for name in ("to_q", "to_k", "to_v")}
        assert scales == {"to_q": 1.0, "to_k": 4.0, "to_v": 1.0}
        assert model.unet.up_blocks[0].attentions[0].proj_in.r[ADAPTER] == 4

    def test_convolutions_have_their_own(self, tiny_model) -> None:
        model = tiny_model()
        attached(model, layers="conv", conv_rank=2, conv_alpha=1.0)
        assert model.get_submodule(CONV).r[ADAPTER] == 2
        assert model.get_submodule(CONV).scaling[ADAPTER] == 0.5
        assert model.get_submodule(LAYER).scaling[ADAPTER] == 1.0

    def test_rslora(self, tiny_model) -> None:
        """8 / sqrt(4) instead of 8 / 4."""
        model = tiny_model()
        attached(model, alpha=8.0, rslora=True)
        assert model.get_submodule(LAYER).scaling[ADAPTER] == 4.0

    def test_include_and_exclude(self, tiny_model) -> None:
        model = tiny_model()
        attached(model, include=["unet.up_blocks.*"], exclude=["*.ff.*", "*.proj_*"])
        names = [name for name, module in model.named_modules() if module in adapters(model)]
        assert names
        assert all(name.startswith("unet.up_blocks.") and ".attn" in name for name in names)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"include": ["unet.up_block.*"]}, r"tuning\.include: 'unet\.up_block\.\*' matches none"),
            ({"rank_pattern": {"text_encoder.*": 2}}, r"tuning\.rank_pattern: .* matches none"),
            ({"exclude": ["*"]}, "leave no layer"),
        ],
    )
    def test_patterns_that_match_nothing_are_refused(self, tiny_model, options, message: str) -> None:
        with pytest.raises(UserError, match=message):
            attached(tiny_model(), **options)

    @pytest.mark.parametrize("options", [{"rslora": True, "alpha": 8.0}, {"rank_pattern": {"*.to_q": 2}, "alpha": 3.0}])
    def test_files_say_the_scale_that_programs_compute(self, tiny_model, tmp_path: Path, options) -> None:
        """alpha / rank, which is all that they know."""
        model, plain = tiny_model(), tiny_model()
        attached(model, **options)
        randomise(model)
        write_lora(model, tmp_path / "lora.safetensors", torch.float32, "kohya")
        x = torch.randn(2, model.get_submodule(LAYER).in_features)
        with applied_lora(plain, read_lora(tmp_path / "lora.safetensors", "lora"), "lora"):
            torch.testing.assert_close(plain.get_submodule(LAYER)(x), model.get_submodule(LAYER)(x))


class TestInitialization:
    @pytest.mark.parametrize("method", ["pissa", "olora"])
    def test_factors_are_pefts(self, method) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(24, 40)
        layer.weight.data = layer.weight.data @ torch.diag(torch.linspace(3, 0.1, 24))
        weight = layer.weight.detach().clone()
        module = nn.ModuleDict({"a": layer})
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["a"], init_lora_weights=method)
        inject_adapter_in_model(config, module, adapter_name=ADAPTER)
        theirs = module["a"].lora_B[ADAPTER].weight @ module["a"].lora_A[ADAPTER].weight
        down, up = decomposed(weight, 4, method)
        ours = up @ down / (2 if method == "pissa" else 1)  # of PiSSA, s B A is the part; of OLoRA, B A
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("method", ["pissa", "olora"])
    def test_the_model_starts_as_the_base_and_trains_like_pefts(self, tiny_model, method) -> None:
        """Outputs are the base's; gradients are those of peft's own layer, whose frozen weight is the rest."""
        model = tiny_model()
        base = copy.deepcopy(model.get_submodule(LAYER))
        tuning = attached(model, alpha=8.0, init=method)
        ours = model.get_submodule(LAYER)
        x = torch.randn(3, base.in_features)
        torch.testing.assert_close(ours(x), base(x), rtol=1e-4, atol=1e-5)
        randomise(model)
        with tuning.base(model):
            assert torch.equal(ours(x), base(x))
        rest = base.weight - ours.scaling[ADAPTER] * ours.first_factors.up @ ours.first_factors.down
        up, down = (factor[ADAPTER].weight.detach().clone().requires_grad_() for factor in (ours.lora_B, ours.lora_A))
        theirs = x @ rest.T + 2 * (x @ down.T @ up.T)
        ours(x).square().sum().backward()
        theirs.square().sum().backward()
        for mine, other in ((ours.lora_B, up), (ours.lora_A, down)):
            torch.testing.assert_close(mine[ADAPTER].weight.grad, other.grad, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("method", ["pissa", "olora"])
    def test_the_file_is_the_difference_to_the_base(self, tiny_model, tmp_path: Path, method) -> None:
        model, plain = tiny_model(), tiny_model()
        attached(model, init=method)
        randomise(model)
        assert lora_from_model(model).layers["unet/" + LAYER.removeprefix("unet.")].rank == 8
        write_lora(model, tmp_path / "lora.safetensors", torch.float32)
        x = torch.randn(3, model.get_submodule(LAYER).in_features)
        with applied_lora(plain, read_lora(tmp_path / "lora.safetensors", "lora"), "lora"):
            torch.testing.assert_close(
                plain.get_submodule(LAYER)(x), model.get_submodule(LAYER)(x), atol=1e-5, rtol=1e-4
            )

    @pytest.mark.parametrize("method", ["pissa", "olora"])
    def test_a_short_training_is_not_lost_to_the_rounding_of_files(self, tiny_model, tmp_path: Path, method) -> None:
        """A change of a thousandth of the factors: their products in fp16, side by side, would be off by a half."""
        model = tiny_model()
        attached(model, init=method, alpha=2.0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, factor in trainable_parameters(model):
                factor += 1e-3 * factor.abs().mean() * torch.randn(factor.shape, generator=generator)
        write_lora(model, tmp_path / "lora.safetensors", torch.float16)
        layer, name = model.get_submodule(LAYER), "unet/" + LAYER.removeprefix("unet.")
        first = layer.first_factors
        up, down = (factor[ADAPTER].weight.detach().double() for factor in (layer.lora_B, layer.lora_A))
        change = layer.scaling[ADAPTER] * (up @ down - first.up.double() @ first.down.double())
        read = read_lora(tmp_path / "lora.safetensors", "lora").layers[name]
        up, down = (read.tensors[f"lora_{side}.weight"].double() for side in ("up", "down"))
        assert read.rank is not None
        found = read.alpha / read.rank * up @ down
        assert (found - change).norm() < 1e-3 * change.norm()

    def test_kaiming(self, tiny_model) -> None:
        """Uniform in 1 / sqrt(in), as `nn.Linear` starts."""
        model = tiny_model()
        attached(model, init="kaiming")
        layer = model.get_submodule(LAYER)
        down = layer.lora_A[ADAPTER].weight
        assert float(down.abs().max()) <= layer.in_features**-0.5
        assert float(down.std()) == pytest.approx(layer.in_features**-0.5 / 3**0.5, rel=0.3)

    def test_convolutions_are_refused(self, tiny_model) -> None:
        with pytest.raises(UserError, match=r"tuning\.init=pissa: is defined for linear layers"):
            attached(tiny_model(), layers="conv", init="pissa")


class TestDropout:
    @staticmethod
    def seeds(num: int = 4, first: int = 0) -> SampleSeeds:
        seeds = SampleSeeds()
        seeds.set(Draws(3, [f"k{i}" for i in range(first, first + num)], [0] * num), torch.device("cpu"))
        return seeds

    @pytest.mark.parametrize("shape", [(4, 5, 64), (8, 5, 64), (4, 64, 3, 3)])
    def test_ranks_are_dropped_for_a_whole_sample(self, shape) -> None:
        out = RankDropout(0.5, "a", self.seeds()).train()(torch.ones(shape))
        by_rank = out.flatten(2) if len(shape) == 4 else out.transpose(1, 2)
        assert (by_rank == by_rank[:, :, :1]).all()
        kept = by_rank[:, :, 0]
        assert set(kept.unique().tolist()) == {0.0, 2.0}
        assert 0.35 < float((kept > 0).float().mean()) < 0.65
        if shape[0] == 8:
            assert torch.equal(kept[0], kept[1])  # two rows of one sample
        assert not torch.equal(kept[0], kept[-1])

    @pytest.mark.parametrize("kind", [RankDropout, ModuleDropout])
    def test_a_sample_has_the_same_masks_alone(self, kind) -> None:
        together = kind(0.5, "a", self.seeds()).train()(torch.ones(4, 3, 64))
        alone = [kind(0.5, "a", self.seeds(1, i)).train()(torch.ones(1, 3, 64)) for i in range(4)]
        assert torch.equal(torch.cat(alone), together)

    def test_modules_are_dropped_whole_and_not_scaled(self) -> None:
        out = ModuleDropout(0.5, "a", self.seeds(400)).train()(torch.ones(400, 3, 8))
        assert (out == out[:, :1, :1]).all()
        assert set(out.unique().tolist()) == {0.0, 1.0}
        assert 0.4 < float(out.mean()) < 0.6

    @pytest.mark.parametrize("option", ["rank_dropout", "module_dropout"])
    def test_they_are_in_the_step_and_not_in_evaluation(self, tiny_model, option: str) -> None:
        model = tiny_model().train()
        tuning = attached(model, **{option: 0.5})
        randomise(model)
        layer, x = model.get_submodule(LAYER), torch.randn(16, 4, model.get_submodule(LAYER).in_features)
        tuning.seed_dropout(Draws(3, [f"k{i}" for i in range(16)], [0] * 16), torch.device("cpu"))
        dropped, again = layer(x), layer(x)
        whole = layer.eval()(x)
        assert torch.equal(dropped, again)
        assert not torch.allclose(dropped, whole)
        if option == "module_dropout":
            base = layer.get_base_layer()(x)
            is_base = [torch.allclose(one, other) for one, other in zip(dropped, base, strict=True)]
            is_whole = [torch.allclose(one, other) for one, other in zip(dropped, whole, strict=True)]
            assert all(a != b for a, b in zip(is_base, is_whole, strict=True))
            assert 0 < sum(is_base) < 16


class TestUpdates:
    def test_lora_plus_is_a_rate_of_the_upper_factor(self, tiny_model) -> None:
        model = tiny_model()
        tuning = attached(model, lora_plus=16.0)
        optimizer = scale_rates(adamw(tuning.groups(model), lr=1e-4))
        names = {id(p): name for name, p in model.named_parameters()}
        rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        assert rates[f"{LAYER}.lora_A.default.weight"] == pytest.approx(1e-4)
        assert rates[f"{LAYER}.lora_B.default.weight"] == pytest.approx(1.6e-3)
        assert len(rates) == sum(p.requires_grad for p in model.parameters())

    def test_the_norm_of_a_product_by_hand(self) -> None:
        down, up = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [2.0]])
        assert float(product_norm(down, up)) == pytest.approx(5 * 5**0.5)

    def test_max_norm_scales_both_factors(self, tiny_model) -> None:
        model = tiny_model()
        tuning = attached(model, alpha=8.0, max_norm=1.2)
        randomise(model)
        before = {name: layer for name, layer in lora_from_model(model).layers.items()}
        norms = {name: delta(layer).norm() for name, layer in before.items()}
        assert max(norms.values()) > 1.2 > min(norms.values())
        factors = before["unet/" + LAYER.removeprefix("unet.")].tensors
        shares = [float(factor.norm()) for factor in factors.values()]
        tuning.after_step(model, None)
        for name, layer in lora_from_model(model).layers.items():
            assert float(delta(layer).norm()) == pytest.approx(min(float(norms[name]), 1.2), rel=1e-4)
        after = [float(factor.norm()) for factor in factors.values()]  # the tensors are the model's own
        assert after[0] / shares[0] == pytest.approx(after[1] / shares[1])

    def test_a_layer_of_zeros_stays(self, tiny_model) -> None:
        model = tiny_model()
        attached(model)
        limit_norms(adapters(model), ADAPTER, 1.0)
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert float(model.get_submodule(LAYER).lora_B[ADAPTER].weight.abs().max()) == 0

    def test_decay_to_the_base(self, tiny_model) -> None:
        """w - rate x decay x (w - w0), with no other decay: 1 - 0.1 x 0.5 x (1 - 0) = 0.95."""
        model = tiny_model()
        tuning = Full(decay_to_base=0.5)
        tuning.attach(model)
        optimizer = scale_rates(adamw(tuning.groups(model), lr=0.1))
        assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
        weight = model.get_submodule(LAYER).weight
        initial = weight.detach().clone()
        with torch.no_grad():
            weight.add_(1.0)
        tuning.after_step(model, optimizer)
        torch.testing.assert_close(weight.detach(), initial + 0.95)


def delta(layer) -> torch.Tensor:
    down, up = layer.tensors["lora_down.weight"], layer.tensors["lora_up.weight"]
    return layer.scale * up.flatten(1) @ down.flatten(1)


class TestStart:
    @pytest.mark.parametrize("layout", ["kohya", "diffusers"])
    def test_goes_on_from_a_file_with_its_ranks_and_alphas(self, tiny_model, tmp_path: Path, layout) -> None:
        first, second = tiny_model(), tiny_model()
        attached(first, rank=3, alpha=6.0, rank_pattern={"*.to_q": 2})
        randomise(first)
        write_lora(first, tmp_path / "lora.safetensors", torch.float32, layout)
        attached(second, rank=8, start=str(tmp_path / "lora.safetensors"))
        x = torch.randn(3, first.get_submodule(LAYER).in_features)
        torch.testing.assert_close(second.get_submodule(LAYER)(x), first.get_submodule(LAYER)(x))
        assert second.get_submodule(LAYER).r[ADAPTER] == 2
        trained = {name for name, p in second.named_parameters() if p.requires_grad}
        assert trained == {name for name, p in first.named_parameters() if p.requires_grad}

    def test_layers_that_the_file_lacks_are_new(self, tiny_model, tmp_path: Path) -> None:
        first, second = tiny_model(), tiny_model()
        attached(first, rank=3, layers="attention")
        randomise(first)
        write_lora(first, tmp_path / "lora.safetensors", torch.float32)
        attached(second, rank=8, start=str(tmp_path / "lora.safetensors"))
        assert second.get_submodule(LAYER).r[ADAPTER] == 3
        proj = second.unet.mid_block.attentions[0].proj_in
        assert proj.r[ADAPTER] == 8
        assert float(proj.lora_B[ADAPTER].weight.abs().max()) == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layers": "attention"}, r"tuning\.start=.*: has an adapter of unet\..*, which gets none here"),
            ({"method": "dora"}, r"is a lora with lora_A, lora_B, .* choose the tuning\.method of the file"),
            ({"init": "pissa"}, r"tuning\.init=pissa: the adapter starts from tuning\.start"),
            ({"start": "missing.safetensors"}, r"tuning\.start=missing\.safetensors: there is no such file"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, tiny_model, tmp_path: Path, options, message: str) -> None:
        first = tiny_model()
        attached(first)
        write_lora(first, tmp_path / "lora.safetensors", torch.float32)
        with pytest.raises(UserError, match=message):
            attached(tiny_model(), **{"start": str(tmp_path / "lora.safetensors"), **options})


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"method": "loha", "rslora": True}, "rslora"),
        ({"method": "lokr", "lora_plus": 4.0}, "lora_plus"),
        ({"method": "loha", "max_norm": 1.0}, "max_norm"),
        ({"method": "lokr", "rank_dropout": 0.1}, "rank_dropout"),
        ({"method": "dora", "module_dropout": 0.1}, "module_dropout"),
        ({"method": "dora", "max_norm": 1.0}, "max_norm"),
        ({"method": "dora", "init": "pissa"}, "init"),
        ({"conv_rank": 2}, "conv_rank"),
        ({"conv_alpha": 2.0}, "conv_alpha"),
        ({"stop_at": {"unet": 0.5}}, "stop_at"),
        ({"stop_at": {"words": 0.5}}, "stop_at"),
        ({"vectors": {"zorbix": 2}}, "vectors"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, key: str) -> None:
    with pytest.raises(UserError, match=rf"tuning\.{key}"):
        Adapter(rank=4, **options)
