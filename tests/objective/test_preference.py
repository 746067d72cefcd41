"""Diffusion-DPO: the loss against a plain recomputation, what it is at the start, and that it does not depend on how a
batch is split.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_objective import finetuning, noised, singles
from torch import nn

from sdft.batch import Batch, Conditioning
from sdft.errors import UserError
from sdft.models.sdxl import SDXL
from sdft.objective.denoising import Denoising
from sdft.objective.preference import Preference
from sdft.objective.timesteps import UniformTimesteps
from sdft.protocols import NoiseConfig
from sdft.rng import Draws
from sdft.training.run import refuse_unpaired
from sdft.tuning.adapter import Adapter
from sdft.tuning.full import Full

TUNINGS: dict[str, Callable] = {
    "full": Full,
    "lora_unet": partial(Adapter, rank=2, alpha=4.0),
    "lora_unet_te": partial(
        Adapter, rank=2, parts=("unet", "text_encoder", "text_encoder_2"), new_words={"<sks>": "red cat"}
    ),
}


def with_pairs(batch: Batch) -> Batch:
    """The batch with rejected pictures of noise, cropped elsewhere."""
    g = torch.Generator().manual_seed(21)
    pixels = torch.rand(batch.pixels_BCHW.shape, generator=g) * 2 - 1
    return replace(batch, rejected_pixels_BCHW=pixels, rejected_time_ids_B6=batch.time_ids_B6 + 1)


def exchanged(batch: Batch) -> Batch:
    """The same pairs, of which the other picture is preferred."""
    return replace(
        batch,
        pixels_BCHW=batch.rejected_pixels_BCHW,
        time_ids_B6=batch.rejected_time_ids_B6,
        rejected_pixels_BCHW=batch.pixels_BCHW,
        rejected_time_ids_B6=batch.time_ids_B6,
    )


def report(module, batch: Batch):
    return module.objective(module.model, batch, Draws(4, batch.keys, batch.visits))


def moved(module, size: float = 0.02) -> None:
    """Move the trained weights, as training would."""
    g = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for p in module.model.parameters():
            if p.requires_grad:
                p += size * torch.randn(p.shape, generator=g)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", TUNINGS)
def test_at_the_start_nothing_is_preferred(name: str, prediction, tiny_model, tiny_batch) -> None:
    """The model is the reference: the loss is log 2 to the bit, whatever beta is, and no pair counts as right."""
    module = finetuning(tiny_model(), TUNINGS[name](), Preference(prediction, beta=1e6))
    found = report(module, with_pairs(tiny_batch(3, dropped=(1,))))
    assert found.per_sample_B.tolist() == [float(torch.tensor(2.0).log())] * 3
    assert found.per_sample_B[0].item() == pytest.approx(0.693147, abs=1e-6)
    assert found.figures["accuracy"].tolist() == [0.5] * 3
    (found.per_sample_B.sum()).backward()
    assert sum(float(p.grad.abs().sum()) for p in module.model.parameters() if p.grad is not None) > 0


class Shrinking(nn.Module):
    """Predicts `weight` times what it gets: a model of which every error can be worked out by hand."""

    noise_config, device = NoiseConfig(), torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def latent_shape(self, batch: Batch) -> tuple[int, int, int]:
        return 1, 1, 1

    def encode_images(self, batch: Batch, eps: torch.Tensor) -> torch.Tensor:
        return batch.moments_BCHW

    def condition(self, batch: Batch) -> Conditioning:
        return Conditioning(torch.zeros(1, 1, 1), torch.zeros(1, 1), batch.time_ids_B6)

    def denoise(self, z_t: torch.Tensor, t_B: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        return self.weight * z_t


def test_the_loss_by_hand() -> None:
    """One latent, timestep 0, where a^2 = 1 - 0.00085 = 0.99915. The reference predicts 0, so both of its errors are
    eps^2; the model predicts 0.5 z_t, so its errors are (0.5 (a z0 + s eps) - eps)^2, for z0 = 3 and z0 = -1."""
    model, objective = Shrinking(), Preference(beta=3.0, timesteps=UniformTimesteps(0.0, 1e-9))
    tuning = Full(parts=("",))
    tuning.initial = {"weight": torch.zeros(())}
    objective.attach(partial(tuning.base, model))
    with torch.no_grad():
        model.weight.fill_(0.5)
    pair = Batch(
        ["a"], [0], ["x"], torch.zeros(1, dtype=torch.bool), torch.zeros(1, 6), torch.ones(1),
        moments_BCHW=torch.full((1, 1, 1, 1), 3.0),
        rejected_moments_BCHW=torch.full((1, 1, 1, 1), -1.0), rejected_time_ids_B6=torch.zeros(1, 6),
    )  # fmt: skip
    draws = Draws(0, ["a"], [0])
    eps = float(draws.normal("noise", (1, 1, 1)))
    a, s = math.sqrt(0.99915), math.sqrt(0.00085)
    err_w, err_l = ((0.5 * (a * z0 + s * eps) - eps) ** 2 for z0 in (3.0, -1.0))
    inside = -0.5 * 3.0 * ((err_w - eps**2) - (err_l - eps**2))
    found = objective(model, pair, draws)
    assert found.per_sample_B.item() == pytest.approx(math.log(1 + math.exp(-inside)), rel=1e-5)
    assert float(found.figures["eps_mse"]) == pytest.approx(err_w, rel=1e-5)
    assert float(found.figures["accuracy"]) == float(inside > 0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["full", "lora_unet"])
def test_loss_and_gradient_equal_plain_pytorch(name: str, prediction: str, tiny_model, tiny_batch) -> None:
    """Each picture in a pass of its own, with the reference a model of its own, on the formulas alone."""
    batch = with_pairs(tiny_batch(3, visits=[0, 5, 2]))
    module = finetuning(tiny_model(), TUNINGS[name](), Preference(prediction, beta=5.0))
    moved(module)
    before = {n: p.detach().clone() for n, p in module.model.named_parameters()}
    found = report(module, batch)
    found.per_sample_B.mean().backward()
    grads = {n: p.grad.clone() for n, p in module.model.named_parameters() if p.grad is not None}
    module.model.zero_grad()

    reference = tiny_model()
    err_w, err_l = (errors(module.model, one, prediction) for one in (batch, batch.rejected))
    with torch.no_grad():
        ref_w, ref_l = (errors(reference, one, prediction) for one in (batch, batch.rejected))
    inside = -0.5 * 5.0 * ((err_w - ref_w) - (err_l - ref_l))
    by_hand = -torch.log(1 / (1 + torch.exp(-inside)))
    by_hand.mean().backward()

    torch.testing.assert_close(found.per_sample_B, by_hand, rtol=1e-5, atol=1e-6)
    assert found.figures["accuracy"].tolist() == (inside > 0).float().tolist()
    torch.testing.assert_close(found.figures["eps_mse"], err_w, rtol=1e-5, atol=1e-6)
    for n, p in module.model.named_parameters():
        assert torch.equal(p, before[n]), f"{n} was changed"
        if p.grad is not None:
            torch.testing.assert_close(grads[n], p.grad, rtol=1e-4, atol=1e-6)


def errors(model: SDXL, batch: Batch, prediction: str) -> torch.Tensor:
    """The squared error of eps of each picture."""
    z_t, t, eps, a, s, *_ = noised(model, batch, 4, 0.0)
    with torch.no_grad():
        cond = model.condition(batch)
    out = model.denoise(z_t, t, cond)
    predicted = out if prediction == "epsilon" else a * out + s * z_t
    return (predicted - eps).square().mean(dim=(1, 2, 3))


def test_exchanging_the_pictures_turns_the_preference(tiny_model, tiny_batch) -> None:
    """-log sigmoid(x) and -log sigmoid(-x) differ by x."""
    batch = with_pairs(tiny_batch(3))
    module = finetuning(tiny_model(), Full(), Preference(beta=20.0))
    moved(module)
    ours, theirs = report(module, batch), report(module, exchanged(batch))
    logit = theirs.per_sample_B - ours.per_sample_B
    torch.testing.assert_close(torch.nn.functional.softplus(-logit), ours.per_sample_B, rtol=1e-4, atol=1e-6)
    assert (ours.figures["accuracy"] + theirs.figures["accuracy"]).tolist() == [1.0] * 3
    assert logit.abs().min() > 1e-4


def test_without_strength_or_difference_it_is_log_2(tiny_model, tiny_batch) -> None:
    batch = with_pairs(tiny_batch(2))
    module = finetuning(tiny_model(), Full(), Preference(beta=1e-12))
    moved(module)
    assert report(module, batch).per_sample_B.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)
    module.objective.beta = 1e6
    same = replace(batch, rejected_pixels_BCHW=batch.pixels_BCHW, rejected_time_ids_B6=batch.time_ids_B6)
    assert report(module, same).per_sample_B.tolist() == pytest.approx([math.log(2)] * 2, abs=0.1)
    assert (report(module, batch).per_sample_B - math.log(2)).abs().min() > 0.5


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_pair_does_not_depend_on_its_batch(dropout: float, tiny_model, tiny_batch) -> None:
    """Also with dropout, whose masks are the samples' own."""
    batch = with_pairs(tiny_batch(4, dropped=(2,)))
    module = finetuning(tiny_model(), Adapter(rank=2, dropout=dropout), Preference(beta=50.0))
    moved(module, 0.1)

    def losses(one: Batch) -> torch.Tensor:
        module.tuning.seed_dropout(Draws(4, one.keys, one.visits), torch.device("cpu"))
        return report(module, one).per_sample_B

    with torch.no_grad():
        together, alone = losses(batch), torch.cat([losses(one) for one in singles(batch)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    assert together.std() > 1e-3


@pytest.mark.parametrize("name", TUNINGS)
def test_training_prefers_the_preferred(name: str, tiny_model, tiny_batch) -> None:
    """A few steps on two pairs: every pair is ordered rightly, through the one training step."""
    batch = with_pairs(tiny_batch(2))
    module = finetuning(tiny_model(), TUNINGS[name](), Preference(beta=200.0))
    optimizer = torch.optim.AdamW((p for p in module.model.parameters() if p.requires_grad), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        loss = module.training_step(batch, 0)
        loss.backward()
        optimizer.step()
    found = report(module, batch)
    assert found.figures["accuracy"].tolist() == [1.0, 1.0]
    assert found.per_sample_B.mean().item() < 0.6


def test_validation_is_that_of_other_runs(tiny_model, tiny_batch) -> None:
    """eps_mse of the preferred pictures, on the same (image, timestep, noise) triples as any run's."""
    batch = with_pairs(tiny_batch(2))
    for prediction in ("epsilon", "v_prediction"):
        ours = Preference(prediction, timesteps=UniformTimesteps(0.5, 1.0)).for_validation()
        theirs = Denoising(prediction).for_validation()
        model = tiny_model()
        with torch.no_grad():
            a, b = (each(model, batch, Draws(0, batch.keys, batch.visits)) for each in (ours, theirs))
        assert torch.equal(a.figures["eps_mse"], b.figures["eps_mse"])


def test_what_has_no_pairs_is_refused(tiny_model, tiny_batch, tiny_source) -> None:
    module = finetuning(tiny_model(), Full(), Preference())
    with pytest.raises(UserError, match=r"objective=preference: .* no rejected pictures; choose data=preference"):
        report(module, tiny_batch(2))
    with pytest.raises(UserError, match=r"objective=preference: the data has no pairs .* data=toy_preference"):
        refuse_unpaired(Preference(), object())
