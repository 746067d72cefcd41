"""Losses, weightings, timesteps and noise, against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from sdft.api import load_model
from sdft.batch import Batch
from sdft.errors import UserError
from sdft.objective.denoising import Denoising, masked_mean
from sdft.objective.loss import L2, Huber, SmoothL1
from sdft.objective.noise import Gaussian, Offset, Perturbed, Pyramid
from sdft.objective.noise_schedule import FlowSchedule, NoiseSchedule
from sdft.objective.prediction import target_of, weight_for_eps, weight_for_z0
from sdft.objective.prior import OutsidePrior, PriorPrediction
from sdft.objective.timesteps import CubicTimesteps
from sdft.objective.weighting import P2, Curve, Debiased, MinSNR, SNRInverse, SoftMinSNR, Uniform
from sdft.rng import Draws, Position
from sdft.tuning.adapter import Adapter

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def fp64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


class TestLosses:
    @staticmethod
    def error(loss, d: float, snr: float = 1.0, time: float = 0.5) -> float:
        target = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
        return float(loss(target + d, target, fp64(snr), fp64(time)))

    def test_l2(self) -> None:
        assert self.error(L2(), -0.3) == pytest.approx(0.09)

    def test_huber(self) -> None:
        """2 x 0.1 (sqrt(0.09 + 0.01) - 0.1) = 0.2 x 0.2162278."""
        assert self.error(Huber(0.1, "constant"), -0.3) == pytest.approx(0.04324555, rel=1e-6)

    def test_huber_is_square_near_0_and_linear_far_away(self) -> None:
        loss = Huber(0.1, "constant")
        assert self.error(loss, 1e-4) == pytest.approx(1e-8, rel=1e-5)
        assert self.error(loss, 101.0) - self.error(loss, 100.0) == pytest.approx(0.2, rel=1e-5)

    def test_smooth_l1(self) -> None:
        assert self.error(SmoothL1(0.1, "constant"), -0.3) == pytest.approx(0.4324555, rel=1e-6)

    @pytest.mark.parametrize(
        ("schedule", "snr", "time", "c"),
        [
            ("constant", 1.0, 0.5, 0.1),
            ("exponential", 1.0, 0.5, 0.1**0.5),
            ("exponential", 1.0, 0.0, 1.0),
            ("snr", 1.0, 0.5, 0.1 + 0.9 / 4),  # s / a = 1
            ("snr", 0.25, 0.5, 0.1 + 0.9 / 9),  # s / a = 2
        ],
    )
    def test_schedules_of_c(self, schedule, snr: float, time: float, c: float) -> None:
        assert float(Huber(0.1, schedule).c_at(fp64(snr), fp64(time))) == pytest.approx(c)


class TestWeightings:
    @pytest.mark.parametrize(
        ("weighting", "prediction", "snr", "weight"),
        [
            (MinSNR(5), "sample", 3.0, 3.0),
            (MinSNR(5), "sample", 9.0, 5.0),
            (MinSNR(5), "flow_prediction", 4.0, 4 / 9),  # s = 1 / (1 + 2)
            (SoftMinSNR(4), "epsilon", 12.0, 4 / 16),  # 12 x 4 / 16 / 12
            (SoftMinSNR(4), "v_prediction", 12.0, 3 / 13),
            (P2(1, 1), "epsilon", 3.0, 0.25),
            (P2(0.5, 1), "epsilon", 3.0, 0.5),
            (P2(0, 1), "epsilon", 3.0, 1.0),
            (P2(1, 1), "v_prediction", 3.0, 0.25 * 3 / 4),  # an error of v is one of a of eps, a^2 = 3 / 4
            (SNRInverse(20), "epsilon", 4.0, 0.25),
            (SNRInverse(20), "epsilon", 0.01, 20.0),
            (SNRInverse(20), "sample", 4.0, 1.0),
            (Debiased(), "epsilon", 4.0, 0.5),
            (Uniform(), "sample", 4.0, 1.0),
        ],
    )
    def test_by_hand(self, weighting, prediction, snr: float, weight: float) -> None:
        assert float(weighting(fp64(snr), prediction)) == pytest.approx(weight)
        assert float(weighting.at_time(fp64(0.3), fp64(snr), prediction)) == pytest.approx(weight)

    @pytest.mark.parametrize("weigh", [weight_for_z0, weight_for_eps])
    def test_one_error_weighs_the_same_whatever_is_predicted(self, weigh) -> None:
        """An error of z0, or of eps, at one noise level, seen as an error of each prediction."""
        z0, eps = fp64(0.7), fp64(-1.3)
        for prediction in PREDICTIONS:
            schedule = FlowSchedule() if prediction == "flow_prediction" else NoiseSchedule()
            a, s, snr = schedule.a[400:401], schedule.s[400:401], schedule.snr[400:401]
            z_t = a * z0 + s * eps
            if weigh is weight_for_z0:
                guess = z0 + 0.1
                implied = (z_t - a * guess) / s
                predicted = target_of(prediction, guess, implied, a, s)
            else:
                guess = eps + 0.1
                predicted = target_of(prediction, (z_t - s * guess) / a, guess, a, s)
            error = (predicted - target_of(prediction, z0, eps, a, s)).square()
            assert float(weigh(torch.ones(1), snr, prediction) * error) == pytest.approx(0.01, rel=1e-9)

    def test_curve(self) -> None:
        curve = Curve([[0.2, 1.0], [0.6, 3.0]])
        weights = curve.at_time(fp64(0.0, 0.2, 0.3, 0.6, 1.0), fp64(1, 1, 1, 1, 1), "epsilon")
        assert weights.tolist() == pytest.approx([1.0, 1.0, 1.5, 3.0, 3.0])

    @pytest.mark.parametrize("points", [[], [[0.5, 1], [0.2, 1]], [[0, 1], [2, 1]], [[0, -1], [1, 1]]])
    def test_no_curve(self, points) -> None:
        with pytest.raises(UserError, match=r"objective\.weighting\.points"):
            Curve(points)


@pytest.mark.parametrize(("u", "t"), [(0.0, 999), (0.5, 875), (0.8, 487), (1 - 1e-12, 0)])
def test_cubic_timesteps(u: float, t: int) -> None:
    """1 - 0.5^3 = 0.875; 1 - 0.8^3 = 0.488, less a rounding."""
    assert CubicTimesteps()(fp64(u)).tolist() == [t]


class TestStratified:
    def draws(self, first: int, num: int, step: int = 3, per_step: int = 8) -> torch.Tensor:
        keys = [f"k{i}" for i in range(first, first + num)]
        return Draws(0, keys, [0] * num, Position(step, first, per_step, 0.0)).stratified("timestep")

    def test_each_eighth_of_the_schedule_has_one_sample(self) -> None:
        assert sorted((self.draws(0, 8) * 8).long().tolist()) == list(range(8))

    def test_however_the_step_is_split(self) -> None:
        split = torch.cat([self.draws(first, 2) for first in (0, 2, 4, 6)])
        assert torch.equal(split, self.draws(0, 8))

    def test_each_sample_is_uniform_over_the_steps(self) -> None:
        u_N = torch.cat([self.draws(5, 1, step) for step in range(2000)])
        assert not torch.equal(u_N[:1], u_N[1:2])
        counts = torch.histc(u_N.float(), 10, 0, 1)
        assert float(((counts - 200) ** 2 / 200).sum()) < 27.9  # chi squared of 9 degrees of freedom, 1 in 1000

    def test_the_variance_of_a_steps_loss_is_lower(self) -> None:
        """Of the mean of 8 samples, in 12 steps of nano: 0.014 instead of 0.100 in 30."""
        model, found = load_model("nano"), {}
        latents = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        batch = Batch(
            keys=[f"k{i}" for i in range(8)],
            visits=[0] * 8,
            captions=["a photo of a cat"] * 8,
            dropped_B=torch.zeros(8, dtype=torch.bool),
            time_ids_B6=torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(8, -1),
            loss_weight_B=torch.ones(8),
            moments_BCHW=torch.cat([latents, torch.full_like(latents, -8.0)], dim=1),
        )
        for stratified in (False, True):
            objective, losses = Denoising(stratified=stratified), []
            for step in range(12):
                draws = Draws(0, batch.keys, [step] * 8, Position(step, 0, 8, 0.0))
                with torch.no_grad():
                    losses.append(objective(model, batch, draws).per_sample_B.mean())
            found[stratified] = torch.stack(losses).var()
        assert found[True] < 0.4 * found[False]


class TestNoise:
    shape = (4, 8, 8)

    @staticmethod
    def draws(num: int = 2, progress: float = 0.0) -> Draws:
        return Draws(7, [f"k{i}" for i in range(num)], [0] * num, Position(0, 0, num, progress))

    def test_offset_is_one_number_per_channel(self) -> None:
        z0, draws = torch.zeros(2, *self.shape), self.draws()
        added = Offset(0.1)(draws, z0) - Gaussian()(draws, z0)
        expected = 0.1 * draws.normal("offset", (4, 1, 1)).expand_as(added)
        torch.testing.assert_close(added, expected)

    def test_random_offset_has_a_strength_for_each_sample(self) -> None:
        z0, draws = torch.zeros(2, *self.shape), self.draws()
        added = Offset(0.1, random=True)(draws, z0) - Gaussian()(draws, z0)
        strength_B = added[:, 0, 0, 0] / draws.normal("offset", (4, 1, 1))[:, 0, 0, 0]
        torch.testing.assert_close(strength_B, 0.1 * draws.uniform("offset strength").float(), rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(("adaptive", "strength"), [(0.5, 0.1 + 0.5 * 2), (-0.01, 0.1 - 0.01 * 2), (-1.0, 0.0)])
    def test_adaptive_offset(self, adaptive: float, strength: float) -> None:
        """The mean of every channel is -2."""
        z0, draws = torch.full((2, *self.shape), -2.0), self.draws()
        added = Offset(0.1, adaptive=adaptive)(draws, z0) - Gaussian()(draws, z0)
        expected = strength * draws.normal("offset", (4, 1, 1)).expand_as(added)
        torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)

    def test_no_offset_is_refused(self) -> None:
        with pytest.raises(UserError, match="objective/noise=gaussian"):
            Offset(0.0)

    def test_pyramid_has_unit_deviation_and_more_of_low_frequencies(self) -> None:
        z0, draws = torch.zeros(16, 4, 32, 32), self.draws(16)
        plain, pyramid = Gaussian()(draws, z0), Pyramid(6, 0.8)(draws, z0)
        torch.testing.assert_close(pyramid.std(dim=(1, 2, 3)), torch.ones(16))
        means = [noise.mean(dim=(2, 3)).std() for noise in (plain, pyramid)]
        assert means[0] == pytest.approx(1 / 32, rel=0.3)
        assert means[1] > 4 * means[0]

    def test_one_level_of_a_pyramid_by_hand(self) -> None:
        """Level 0 has the size of the latents: (eps + more) / deviation."""
        z0, draws = torch.zeros(1, *self.shape), self.draws(1)
        total = draws.normal("noise", self.shape) + draws.normal("pyramid level 0", self.shape)
        torch.testing.assert_close(Pyramid(1, 0.8)(draws, z0), total / total.std())

    @pytest.mark.parametrize("noise", [Gaussian(), Offset(0.1, True, 0.2), Pyramid()])
    def test_a_sample_has_the_same_noise_alone(self, noise) -> None:
        z0, draws = torch.randn(3, *self.shape, generator=torch.Generator().manual_seed(0)), self.draws(3)
        alone = torch.cat([noise(one, z0[i : i + 1]) for i, one in enumerate(draws.samples())])
        assert torch.equal(alone, noise(draws, z0))

    @pytest.mark.parametrize(("progress", "strength"), [(0.0, 0.1), (0.25, 0.05), (0.5, 0.0), (0.9, 0.0)])
    def test_the_perturbation_falls_to_0_over_its_share_of_the_run(self, progress: float, strength: float) -> None:
        eps, draws = torch.zeros(2, *self.shape), self.draws(2, progress)
        added = Perturbed(0.1, share=0.5)(eps, draws)
        torch.testing.assert_close(added, strength * draws.normal("perturbation", self.shape))

    def test_the_perturbation_is_not_in_the_target(self, tiny_model, tiny_batch) -> None:
        """The loss is that of the plain target at a moved input."""
        model, batch = tiny_model(), tiny_batch(2)
        draws = Draws(0, batch.keys, batch.visits)
        seen = []
        denoise = model.denoise
        model.denoise = lambda z_t, t_B, cond: seen.append((z_t, denoise(z_t, t_B, cond))) or seen[-1][1]
        with torch.no_grad():
            Denoising()(model, batch, draws)
            report = Denoising(input_perturbation=0.5)(model, batch, draws)
        t_B = (draws.uniform("timestep") * 1000).long()
        s = NoiseSchedule().s[t_B].float()[:, None, None, None]
        shape = model.latent_shape(batch)
        torch.testing.assert_close(seen[1][0] - seen[0][0], s * 0.5 * draws.normal("perturbation", shape))
        expected = (seen[1][1] - draws.normal("noise", shape)).square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(report.per_sample_B, expected)

    @pytest.mark.parametrize("options", [{"perturbed_share": 0.5}, {"input_perturbation": 0.1, "perturbed_share": 0}])
    def test_a_share_without_perturbation_is_refused(self, options) -> None:
        with pytest.raises(UserError, match=r"objective\.perturbed_share"):
            Denoising(**options)


def test_a_mask_that_is_not_normalised_counts_by_its_size() -> None:
    """A quarter of the picture inside, the rest at 0.2: (1 + 0.2 x 3) / 4 of an even error."""
    error, mask = torch.ones(1, 4, 2, 2), torch.zeros(1, 1, 16, 16)
    mask[..., :8, :8] = 1
    assert float(masked_mean(error, mask, 0.2, normalise=False)) == pytest.approx(0.4)
    assert float(masked_mean(error, mask, 0.2)) == pytest.approx(1.0)


class TestFlow:
    def test_the_path_is_straight(self) -> None:
        schedule = FlowSchedule()
        a, s = schedule.at(torch.tensor([0, 499, 999]))
        assert a.flatten().tolist() == pytest.approx([0.999, 0.5, 0.0], abs=1e-7)
        assert s.flatten().tolist() == pytest.approx([0.001, 0.5, 1.0])
        assert schedule.times[[0, 499, 999]].tolist() == pytest.approx([1, 500, 1000])

    def test_validation_is_at_the_noise_levels_of_the_others(self) -> None:
        plain = NoiseSchedule()
        matched = FlowSchedule.matching(plain)
        torch.testing.assert_close(matched.snr, plain.snr)
        torch.testing.assert_close(matched.a + matched.s, torch.ones(1000, dtype=torch.float64))
        assert Denoising("flow_prediction").for_validation().schedule == "matched_flow"


class TestPriorPrediction:
    def test_it_is_0_before_training_and_by_hand_afterwards(self, tiny_model, tiny_batch) -> None:
        model, batch, tuning = tiny_model(), tiny_batch(2), Adapter(rank=2)
        tuning.attach(model)
        prior = PriorPrediction("a cat", weight=0.5)
        plain, objective = Denoising(), Denoising(prior=prior)
        objective.attach(lambda: tuning.base(model))
        draws = Draws(0, batch.keys, batch.visits)
        with torch.no_grad():
            assert objective(model, batch, draws).figures["prior"].tolist() == [0.0, 0.0]
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
            report, alone = objective(model, batch, draws), plain(model, batch, draws)
            t_B = (draws.uniform("timestep") * 1000).long()
            a, s = NoiseSchedule().at(t_B)
            z0 = model.encode_images(batch, draws.normal("posterior", model.latent_shape(batch)))
            z_t = a * z0 + s * draws.normal("noise", model.latent_shape(batch))
            cond = model.condition(batch)
            cond.context_BLD, cond.pooled_BP = model.encode_prompts(["a cat"] * 2)
            tuned = model.denoise(z_t, t_B, cond)
            with tuning.base(model):
                base = model.denoise(z_t, t_B, cond)
        expected = (tuned - base).square().mean(dim=(1, 2, 3))
        assert expected.min() > 1e-6
        torch.testing.assert_close(report.figures["prior"], expected, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(report.per_sample_B, alone.per_sample_B + 0.5 * expected)

    def test_its_gradient_does_not_reach_the_target(self, tiny_model, tiny_batch) -> None:
        """At the start model and base agree, so that nothing pulls."""
        model, batch, tuning = tiny_model(), tiny_batch(2), Adapter(rank=2)
        tuning.attach(model)
        objective = Denoising(prior=PriorPrediction("a cat"))
        objective.attach(lambda: tuning.base(model))
        report = objective(model, batch, Draws(0, batch.keys, batch.visits))
        report.figures["prior"].sum().backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
        assert grads
        assert all(float(grad.abs().max()) == 0 for grad in grads)
        assert math.isfinite(float(report.per_sample_B.sum()))


class TestOutsidePrior:
    def test_by_hand(self, tiny_model, tiny_batch) -> None:
        """The left half is masked in: the right half is held to the base."""
        model, batch, tuning = tiny_model(), tiny_batch(2), Adapter(rank=2)
        tuning.attach(model)
        c, h, w = model.latent_shape(batch)
        batch.mask_B1HW = torch.zeros(2, 1, 4 * h, 4 * w)
        batch.mask_B1HW[..., : 2 * w] = 1
        objective = Denoising(prior=OutsidePrior(2.0))
        objective.attach(lambda: tuning.base(model))
        draws = Draws(0, batch.keys, batch.visits)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
            report, alone = objective(model, batch, draws), Denoising()(model, batch, draws)
            t_B = (draws.uniform("timestep") * 1000).long()
            a, s = NoiseSchedule().at(t_B)
            z0 = model.encode_images(batch, draws.normal("posterior", (c, h, w)))
            z_t, cond = a * z0 + s * draws.normal("noise", (c, h, w)), model.condition(batch)
            tuned = model.denoise(z_t, t_B, cond)
            with tuning.base(model):
                base = model.denoise(z_t, t_B, cond)
        expected = (tuned - base)[..., w // 2 :].square().mean(dim=(1, 2, 3))
        torch.testing.assert_close(report.figures["prior"], expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(report.per_sample_B, alone.per_sample_B + 2 * expected)

    def test_images_without_masks_are_refused(self, tiny_model, tiny_batch) -> None:
        model, batch, tuning = tiny_model(), tiny_batch(2), Adapter(rank=2)
        tuning.attach(model)
        objective = Denoising(prior=OutsidePrior())
        objective.attach(lambda: tuning.base(model))
        with pytest.raises(UserError, match=r"objective/prior=outside: .*data\.masks=true"):
            objective(model, batch, Draws(0, batch.keys, batch.visits))
