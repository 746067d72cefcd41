"""The objective: noise schedule, weights, timestep distributions, and one step against a plain recomputation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call

from sdft.batch import Batch
from sdft.errors import UserError
from sdft.models.sdxl import SDXL
from sdft.module import Finetuning
from sdft.objective.denoising import Denoising
from sdft.objective.noise import Offset
from sdft.objective.noise_schedule import NoiseSchedule, noise_schedule
from sdft.objective.timesteps import LogitNormalTimesteps, UniformTimesteps
from sdft.objective.weighting import Debiased, MinSNR, Uniform
from sdft.optimizers.optimizers import adamw
from sdft.optimizers.schedules import constant
from sdft.protocols import NoiseConfig
from sdft.rng import Draws, seed_of
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full

SNR = {0: 1175.5, 200: 3.06, 400: 0.738, 600: 0.192, 800: 0.0383, 999: 0.00468}
"""SDXL's, to three digits: shared/SDXL_FACTS.md."""


class TestNoiseSchedule:
    @pytest.mark.parametrize(("t", "snr"), SNR.items())
    def test_snr_is_sdxls(self, t: int, snr: float) -> None:
        assert float(NoiseSchedule().snr[t]) == pytest.approx(snr, rel=3e-3)

    def test_first_step_by_hand(self) -> None:
        """Before the second step nothing is multiplied: a^2 = 1 - beta_start, so snr = (1 - b) / b."""
        assert float(NoiseSchedule().snr[0]) == pytest.approx((1 - 0.00085) / 0.00085, rel=1e-9)

    def test_sigmas_are_those_that_samplers_use(self, tiny_model: Callable[..., SDXL]) -> None:
        """Noise over signal runs from 0.0292 to 14.61, as in the model's own diffusers scheduler."""
        schedule = NoiseSchedule()
        sigmas = schedule.s / schedule.a
        assert float(sigmas[0]) == pytest.approx(0.0292, abs=5e-5)
        assert float(sigmas[-1]) == pytest.approx(14.61, abs=5e-3)
        torch.testing.assert_close(
            schedule.a.square().float(), tiny_model().scheduler.alphas_cumprod, rtol=1e-5, atol=0
        )

    @pytest.mark.parametrize("zero_terminal_snr", [False, True])
    def test_variance_is_kept_and_signal_only_falls(self, zero_terminal_snr: bool) -> None:
        schedule = NoiseSchedule(zero_terminal_snr)
        torch.testing.assert_close(schedule.a**2 + schedule.s**2, torch.ones(1000, dtype=torch.float64))
        torch.testing.assert_close(schedule.snr, (schedule.a / schedule.s) ** 2, rtol=1e-9, atol=0)
        assert (schedule.snr.diff() < 0).all()

    def test_zero_terminal_snr_ends_in_pure_noise_and_leaves_the_first_step(self) -> None:
        plain, rescaled = NoiseSchedule(), NoiseSchedule(zero_terminal_snr=True)
        assert rescaled.snr[-1] == 0
        assert rescaled.s[-1] == 1
        assert rescaled.snr[0] == pytest.approx(float(plain.snr[0]), rel=1e-9)

    def test_zero_terminal_snr_by_hand(self) -> None:
        """In between, a is shifted by a_T and stretched back to a_0 (Lin et al., algorithm 1)."""
        a, rescaled = NoiseSchedule().a, NoiseSchedule(zero_terminal_snr=True)
        a_500 = (a[500] - a[999]) / (a[0] - a[999]) * a[0]
        assert float(rescaled.snr[500]) == pytest.approx(float(a_500**2 / (1 - a_500**2)), rel=1e-9)

    @pytest.mark.parametrize("zero_terminal_snr", [False, True])
    def test_diffusers_schedule_is_ours_in_fp32(self, zero_terminal_snr: bool) -> None:
        """alphas_cumprod to 1e-6, the SNR to 5e-5 of itself (fp32 loses that much in 1 - alphas_cumprod)."""
        ours = NoiseSchedule(zero_terminal_snr)
        theirs = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=zero_terminal_snr
        )
        torch.testing.assert_close(theirs.alphas_cumprod.double(), ours.a.square(), rtol=0, atol=1e-6)
        snr = compute_snr(theirs, torch.arange(1000)).double()
        torch.testing.assert_close(snr, ours.snr, rtol=5e-5, atol=0)

    def test_at_gives_one_pair_a_sample(self) -> None:
        schedule = NoiseSchedule()
        a, s = schedule.at(torch.tensor([999, 0]))
        assert a.shape == s.shape == (2, 1, 1, 1)
        assert a.flatten().tolist() == pytest.approx([math.sqrt(0.00466), math.sqrt(1 - 0.00085)], rel=3e-3)


class TestWeighting:
    @pytest.mark.parametrize(
        ("t", "epsilon", "v"),
        [
            (0, 5 / 1175.5, 5 / 1176.5),  # clipped
            (200, 1.0, 3.06 / 4.06),  # below gamma: SNR / SNR, SNR / (SNR + 1)
            (400, 1.0, 0.738 / 1.738),
            (800, 1.0, 0.0383 / 1.0383),
        ],
    )
    def test_min_snr_by_hand(self, t: int, epsilon: float, v: float) -> None:
        snr = NoiseSchedule().snr[[t]]
        assert float(MinSNR(5)(snr, "epsilon")) == pytest.approx(epsilon, rel=3e-3)
        assert float(MinSNR(5)(snr, "v_prediction")) == pytest.approx(v, rel=3e-3)

    def test_gamma_is_where_the_weight_stops_growing(self) -> None:
        snr = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
        assert MinSNR(1)(snr, "epsilon").tolist() == [1.0, 1.0, 0.5, 0.25]
        assert MinSNR(1)(snr, "v_prediction").tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 3, 1 / 5])

    def test_debiased_by_hand(self) -> None:
        snr = torch.tensor([0.25, 4.0, 1000.0, 1175.5], dtype=torch.float64)
        assert Debiased()(snr, "epsilon").tolist() == pytest.approx([2.0, 0.5, 0.0316228, 0.0316228], rel=1e-5)

    @pytest.mark.parametrize(
        ("weighting", "prediction", "mean"),
        [
            (Uniform(), "epsilon", 1.0),
            (MinSNR(5), "epsilon", 0.917),
            (MinSNR(5), "v_prediction", 0.294),
            (Debiased(), "epsilon", 3.02),
        ],
    )
    def test_mean_over_uniform_timesteps(self, weighting, prediction: str, mean: float) -> None:
        assert float(weighting(NoiseSchedule().snr, prediction).mean()) == pytest.approx(mean, abs=0.005)

    def test_min_snr_weighs_the_same_error_in_z0_for_both_predictions(self) -> None:
        """An error d in z0 is a d / s in eps and d / s in v: squared and weighted, both are min(SNR, gamma) d^2."""
        schedule = NoiseSchedule()
        as_eps = MinSNR(5)(schedule.snr, "epsilon") * (schedule.a / schedule.s) ** 2
        as_v = MinSNR(5)(schedule.snr, "v_prediction") / schedule.s**2
        torch.testing.assert_close(as_eps, schedule.snr.clamp(max=5))
        torch.testing.assert_close(as_v, schedule.snr.clamp(max=5))


class TestTimesteps:
    U = torch.tensor([0.0, 0.25, 0.5, 0.9999999], dtype=torch.float64)

    def test_uniform_by_hand(self) -> None:
        assert UniformTimesteps()(self.U).tolist() == [0, 250, 500, 999]

    def test_uniform_within_bounds(self) -> None:
        assert UniformTimesteps(0.5, 0.75)(self.U).tolist() == [500, 562, 625, 749]

    def test_uniform_visits_each_timestep_alike(self) -> None:
        u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
        assert UniformTimesteps()(u).bincount(minlength=1000).tolist() == [4] * 1000

    @pytest.mark.parametrize(("low", "high"), [(0.5, 0.5), (0.7, 0.2)])
    def test_empty_range_is_refused(self, low: float, high: float) -> None:
        with pytest.raises(UserError, match=r"low=.* must be below high="):
            UniformTimesteps(low, high)

    @pytest.mark.parametrize(
        ("mean", "std", "u", "t"),
        [
            (0.0, 1.0, 0.5, 500),  # the median: sigmoid(0)
            (1.0, 1.0, 0.5, 731),  # sigmoid(1) = 0.7311
            (0.0, 1.0, 0.8413447, 731),  # one standard deviation up
            (0.0, 2.0, 0.1586553, 119),  # two logits down: sigmoid(-2) = 0.1192
        ],
    )
    def test_logit_normal_by_hand(self, mean: float, std: float, u: float, t: int) -> None:
        assert LogitNormalTimesteps(mean, std)(torch.tensor([u], dtype=torch.float64)).tolist() == [t]

    def test_logit_normal_stays_in_the_schedule(self) -> None:
        u = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
        assert LogitNormalTimesteps(0.0, 10.0)(u).tolist() == [0, 999]


class TestRefusals:
    def test_epsilon_with_zero_terminal_snr(self) -> None:
        with pytest.raises(UserError, match="objective=v_zero_snr"):
            Denoising("epsilon", zero_terminal_snr=True)

    def test_debiased_with_v(self) -> None:
        with pytest.raises(UserError, match="weighting=debiased"):
            Denoising("v_prediction", Debiased())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_eps_mse_is_the_error_of_the_noise_that_the_prediction_implies(prediction, tiny_model, tiny_batch) -> None:
    """eps = a v + s z_t, so an error of d in v is one of a d in eps: `eps_mse` of v is a^2 mse."""
    model, batch = tiny_model(), tiny_batch(3, visits=[0, 1, 2])
    objective = Denoising(prediction)
    with torch.no_grad():
        report = objective(model, batch, Draws(0, batch.keys, batch.visits))
        z_t, t, eps, a, s, *_ = noised(model, batch, seed=0, offset=0.0)
        predicted = model.denoise(z_t, t, model.condition(batch))
    implied = predicted if prediction == "epsilon" else a * predicted + s * z_t
    torch.testing.assert_close(report.figures["eps_mse"], (implied - eps).square().mean(dim=(1, 2, 3)))
    factor = 1.0 if prediction == "epsilon" else a.flatten().square()
    torch.testing.assert_close(report.figures["eps_mse"], report.per_sample_B * factor)


def test_a_sample_has_the_same_loss_alone_and_in_a_batch(tiny_model, tiny_batch) -> None:
    """Up to float rounding; its draws are the same bits (test_rng)."""
    model, batch, objective = tiny_model(), tiny_batch(3, dropped=(2,)), Denoising(weighting=MinSNR())
    with torch.no_grad():
        together = objective(model, batch, Draws(0, batch.keys, batch.visits)).per_sample_B
        alone = torch.cat(
            [objective(model, one, Draws(0, one.keys, one.visits)).per_sample_B for one in singles(batch)]
        )
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


STEPS = {
    "epsilon": Denoising("epsilon", MinSNR(5)),
    "v": Denoising("v_prediction", MinSNR(5)),
    "offset": Denoising("epsilon", Debiased(), UniformTimesteps(0.2, 0.9), noise=Offset(0.1)),
    "zero_snr": Denoising("v_prediction", zero_terminal_snr=True),
}


@pytest.mark.parametrize("name", STEPS)
def test_full_step_equals_plain_pytorch(name: str, tiny_model, tiny_batch) -> None:
    """Loss and every weight of the UNet after one AdamW step, to 1e-6."""
    batch = tiny_batch(3, dropped=(1,), visits=[0, 5, 2], loss_weights=[1.0, 0.5, 2.0])
    module = finetuning(tiny_model(), Full(), STEPS[name])
    loss = one_step(module, batch)

    plain = tiny_model()
    by_hand = plain_loss(plain, plain.unet, batch, STEPS[name])
    matrices, vectors = ([p for p in plain.unet.parameters() if (p.ndim > 1) is kind] for kind in (True, False))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01, eps=1e-5)
    by_hand.backward()
    optimizer.step()

    assert loss == pytest.approx(float(by_hand), abs=1e-6)
    apart = largest_difference(module.model.unet.state_dict(), plain.unet.state_dict())
    assert apart <= 1e-6


@pytest.mark.parametrize("name", STEPS)
def test_lora_step_equals_plain_pytorch(name: str, tiny_model, tiny_batch) -> None:
    """The same with W + alpha / rank B A written out instead of peft, from adapters that already do something."""
    batch = tiny_batch(3, dropped=(1,), visits=[0, 5, 2], loss_weights=[1.0, 0.5, 2.0])
    module = finetuning(tiny_model(), Adapter(rank=2, alpha=6.0), STEPS[name])
    adapters = with_random_lora(module.model.unet)
    loss = one_step(module, batch)

    plain = tiny_model()
    plain.requires_grad_(False)
    for tensor in adapters.values():
        tensor.requires_grad_(True)
    weights = {f"{layer}.weight": plain.unet.get_submodule(layer).weight for layer in layers_of(adapters)}
    merged = {
        name: weight + 6.0 / 2 * adapters[name.replace("weight", "lora_B")] @ adapters[name.replace("weight", "lora_A")]
        for name, weight in weights.items()
    }
    by_hand = plain_loss(plain, partial(call_with, plain.unet, merged), batch, STEPS[name])
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01, eps=1e-5)
    by_hand.backward()
    optimizer.step()

    assert loss == pytest.approx(float(by_hand), abs=1e-6)
    apart = largest_difference(lora_from_model(module.model.unet), adapters)
    assert apart <= 1e-6


def finetuning(model: SDXL, tuning, objective: Denoising) -> Finetuning:
    """With an eps above the rounding of gradients (1e-9), or AdamW makes whole steps of what should be zero."""
    return Finetuning(model, tuning, objective, partial(adamw, lr=1e-4, eps=1e-5), constant, seed=4)


def one_step(module: Finetuning, batch: Batch) -> float:
    optimizer = module.build_optimizer()
    loss = module.training_step(batch, 0)
    loss.backward()
    optimizer.step()
    return float(loss)


def noised(
    model: SDXL, batch: Batch, seed: int, offset: float, low: float = 0, high: float = 1, zero_snr: bool = False
):
    """(z_t, t, eps, a, s, z0, snr) of a batch of the tiny model, from the formulas alone."""

    def stream(purpose: str, i: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed_of(seed, purpose, batch.keys[i], batch.visits[i]))

    def normal(purpose: str, *shape: int) -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=stream(purpose, i)) for i in range(len(batch))])

    a_1000 = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).sqrt()
    if zero_snr:
        a_1000 = (a_1000 - a_1000[-1]) / (a_1000[0] - a_1000[-1]) * a_1000[0]
    u = torch.stack([torch.rand((), generator=stream("timestep", i), dtype=torch.float64) for i in range(len(batch))])
    t = (1000 * (low + (high - low) * u)).floor().long()
    a, s = a_1000[t].float().view(-1, 1, 1, 1), (1 - a_1000[t] ** 2).sqrt().float().view(-1, 1, 1, 1)
    with torch.no_grad():
        posterior = model.vae.encode(batch.pixels_BCHW).latent_dist
        z0 = 0.5 * (posterior.mean + posterior.std * normal("posterior", 4, 8, 8))  # 0.5 is the VAE's scaling factor
    eps = normal("noise", 4, 8, 8) + offset * normal("offset", 4, 1, 1)
    return a * z0 + s * eps, t, eps, a, s, z0, a_1000[t] ** 2 / (1 - a_1000[t] ** 2)


def plain_loss(model: SDXL, unet, batch: Batch, objective: Denoising) -> torch.Tensor:
    """The loss of a batch in which one caption is dropped, with no line of sdft but the seeds of its streams."""
    timesteps = objective.timesteps
    offset = getattr(objective.noise, "strength", 0.0)
    settings = (4, offset, timesteps.low, timesteps.high, objective.zero_terminal_snr)
    z_t, t, eps, a, s, z0, snr = noised(model, batch, *settings)
    hidden = []
    for tok, encoder in ((model.tokenizer, model.text_encoder), (model.tokenizer_2, model.text_encoder_2)):
        ids = tok(list(batch.captions), padding="max_length", max_length=77, return_tensors="pt").input_ids
        states = encoder(ids, output_hidden_states=True)
        hidden.append(states.hidden_states[-2])
    context, pooled = torch.cat(hidden, dim=-1).detach(), states.text_embeds.detach()
    for i in batch.dropped_B.nonzero().flatten():
        context[i], pooled[i] = 0, 0
    added = {"text_embeds": pooled, "time_ids": batch.time_ids_B6}
    predicted = unet(z_t, t, context, added_cond_kwargs=added).sample
    if objective.prediction == "epsilon":
        target, weight = eps, snr.clamp(max=5) / snr
    else:
        target, weight = a * eps - s * z0, snr.clamp(max=5) / (snr + 1)
    if isinstance(objective.weighting, Debiased):
        weight = 1 / snr.clamp(max=1000).sqrt()
    elif isinstance(objective.weighting, Uniform):
        weight = torch.ones_like(snr)
    error = (predicted - target).square().mean(dim=(1, 2, 3))
    return (weight.float() * batch.loss_weight_B * error).mean()


def call_with(unet: torch.nn.Module, weights: dict[str, torch.Tensor], *args, **kwargs):
    return functional_call(unet, weights, args, kwargs)


def with_random_lora(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Fill every B, which starts at zero, with small numbers; returns a copy of all A and B."""
    g = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if "lora_B" in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=g))
    return {name: tensor.detach().clone() for name, tensor in lora_from_model(unet).items()}


def lora_from_model(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """`LAYER.lora_A` and `LAYER.lora_B` of every adapted layer."""
    named = {name: p for name, p in unet.named_parameters() if "lora_" in name}
    return {name.removesuffix(".default.weight"): p for name, p in named.items()}


def layers_of(adapters: dict[str, torch.Tensor]) -> list[str]:
    return [name.removesuffix(".lora_A") for name in adapters if name.endswith(".lora_A")]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].detach() - b[name].detach()).abs().max()) for name in a)


def singles(batch: Batch) -> list[Batch]:
    """The samples of a batch as batches of one."""
    parts = []
    for i in range(len(batch)):
        one = copy.copy(batch)
        for name, value in vars(batch).items():
            if value is not None:
                setattr(one, name, value[i : i + 1])
        parts.append(one)
    return parts


def test_a_schedule_of_a_dry_run_is_not_cached() -> None:
    """After a dry run in the same process, as from Python, training must not get tensors without data."""
    config = NoiseConfig(num_timesteps=17)
    with FakeTensorMode():
        assert isinstance(noise_schedule("variance_preserving", config).a, FakeTensor)
    assert type(noise_schedule("variance_preserving", config).a) is torch.Tensor
    assert noise_schedule("variance_preserving", config) is noise_schedule("variance_preserving", config)
