"""Style distances: exact on a line, and a gain that orders pictures known to have more or less of a look."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.stats import wasserstein_distance

from sdft.data.toy.rendering import LOOKS, render
from sdft.data.toy.scenes import split_index
from sdft.data.toy.stories import sample_scene
from sdft.errors import UserError
from sdft.evaluation.style_distance import (
    PATCH,
    SlicedWasserstein,
    directions,
    patch_basis,
    set_distance,
    sort_projections,
    wasserstein,
)
from sdft.evaluation.style_gain import StyleGainMetric, style_gain

TARGETS = ("dreamy", "photo", "technomant")
NUM, NUM_REFERENCES = 48, 96


def _render(look: str, split: str, count: int) -> np.ndarray:
    return np.stack([render(sample_scene(0, split_index(split, i)), look) for i in range(count)])


@pytest.fixture(scope="module")
def drawn() -> dict[str, np.ndarray]:
    """The same test scenes in every look."""
    return {look: _render(look, "test", NUM) for look in LOOKS}


@pytest.fixture(scope="module")
def references() -> dict[str, np.ndarray]:
    return {look: _render(look, "validation", NUM_REFERENCES) for look in TARGETS}


@pytest.fixture(scope="module")
def gauges(drawn, references) -> dict[str, StyleGainMetric]:
    return {look: StyleGainMetric(drawn["plain"], references[look]) for look in TARGETS}


@pytest.fixture(scope="module")
def measure(gauges):
    """The gain of some pictures toward a look, from the plain pictures."""
    return lambda look, pictures: gauges[look](pictures)


def _blurred(pictures: np.ndarray, radius: float) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(radius))) for x in pictures])


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (5, 8), (8, 5), (6, 9), (100, 37), (1, 50)])
def test_wasserstein_is_exact_on_a_line(n: int, m: int) -> None:
    rng = np.random.default_rng(n * 1000 + m)
    a, b = rng.normal(size=(3, n)), rng.normal(0.5, 2.0, size=(3, m))
    expected = np.mean([wasserstein_distance(x, y) for x, y in zip(a, b, strict=True)])
    assert wasserstein(np.sort(a), np.sort(b)) == pytest.approx(expected, rel=1e-12)
    assert wasserstein(np.sort(b), np.sort(a)) == pytest.approx(expected, rel=1e-12)


def test_wasserstein_by_hand() -> None:
    # Half of {0} moves to 1 and half to 3: (1 + 3) / 2.
    assert wasserstein(np.array([[0.0]]), np.array([[1.0, 3.0]])) == 2.0


def test_wasserstein_is_linear_in_mixtures() -> None:
    """Why the power is 1: replacing a share of the points by the target's removes that share of the distance."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=80), rng.normal(3.0, 0.2, size=80)
    whole = wasserstein(np.sort(a)[None], np.sort(b)[None])
    mixed = np.sort(np.concatenate([np.repeat(a, 3), b]))[None]
    assert wasserstein(mixed, np.sort(np.repeat(b, 4))[None]) == pytest.approx(0.75 * whole, rel=1e-9)


def test_patches_do_not_carry_colour() -> None:
    basis = patch_basis()
    assert basis.shape == (3 * (PATCH**2 - 1), 3 * PATCH**2)
    flat = torch.tensor([0.2, 0.5, 0.9]).repeat_interleave(PATCH**2)
    assert (basis.double() @ flat.double()).abs().max() < 1e-6
    # Orthogonal rows, as long as their frequency, doubled for hue: the longest is the diagonal wave (4, 4).
    gram = (basis @ basis.T).double()
    assert (gram - torch.diag(gram.diagonal())).abs().max() < 1e-5
    assert gram.diagonal().max().item() == pytest.approx(4 * 32.0, rel=1e-5)


def test_a_tint_moves_colours_and_not_patches(drawn) -> None:
    pictures = np.clip(drawn["plain"], 0, 205)
    d = SlicedWasserstein(pictures)(pictures + np.uint8(50))
    assert d.colour > 0.5
    assert d.patches < 1e-5


def test_identical_sets_are_at_distance_zero_in_any_order(drawn) -> None:
    ruler = SlicedWasserstein(drawn["photo"])
    for same in (drawn["photo"], drawn["photo"][::-1], list(drawn["photo"])):
        assert ruler(same).d == 0.0
        assert ruler(same).colour == ruler(same).patches == 0.0
    assert ruler(np.concatenate([drawn["photo"]] * 2)).d == pytest.approx(0.0, abs=1e-7)


def test_symmetric_under_one_spread(drawn) -> None:
    plain, photo = drawn["plain"][:40], drawn["photo"]
    ruler = SlicedWasserstein(drawn["dreamy"])
    a, b = ruler.projections(plain), ruler.projections(photo)
    there, back = ruler.between(a, b), ruler.between(b, a)
    assert (there.d, there.colour, there.patches) == pytest.approx((back.d, back.colour, back.patches), rel=1e-6)
    # With a contrast, the spread is that of both sets, so that even the rulers may be exchanged.
    assert SlicedWasserstein(plain, photo)(photo).d == pytest.approx(SlicedWasserstein(photo, plain)(plain).d, rel=1e-5)
    # Without, each ruler measures in its own reference's spread.
    assert SlicedWasserstein(plain)(photo).d != pytest.approx(SlicedWasserstein(photo)(plain).d, rel=0.05)


def test_spread_by_hand() -> None:
    """Half black, half white: the deviation of each channel is 1/2, and along a direction v it is |sum(v)| / 2."""
    black, white = np.zeros((2, 64, 64, 3), np.uint8), np.full((2, 64, 64, 3), 255, np.uint8)
    ruler = SlicedWasserstein(np.concatenate([black, white]))
    reach = np.abs(directions("colour", 0).sum(1).numpy())
    # From all black, half of the mass travels |sum(v)|.
    expected = (reach / 2).mean() / np.sqrt(np.square(reach / 2).mean())
    assert ruler(black).colour == pytest.approx(expected, rel=1e-5)
    assert ruler(black).patches < 1e-5


def test_deterministic_and_seeded(drawn, references, measure) -> None:
    first = measure("photo", drawn["dreamy"])
    assert style_gain(drawn["plain"], drawn["dreamy"], references["photo"]) == first
    other = style_gain(drawn["plain"], drawn["dreamy"], references["photo"], seed=1)
    assert 0 < abs(other.style_gain - first.style_gain) < 0.15


@pytest.mark.parametrize("look", TARGETS)
def test_more_pictures_in_the_look_gain_more(look: str, drawn, measure) -> None:
    gains = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        count = round(share * NUM)
        gains.append(measure(look, np.concatenate([drawn[look][:count], drawn["plain"][count:]])))
    for name in ("total", "colour", "patches"):
        curve = [g.style_gain if name == "total" else getattr(g, name).gain for g in gains]
        assert min(np.diff(curve)) > 0.05, (name, curve)


@pytest.mark.parametrize("look", TARGETS)
def test_pictures_nearer_to_the_look_gain_more(look: str, drawn, measure) -> None:
    plain, target = drawn["plain"].astype(float), drawn[look].astype(float)
    blends = [np.rint(plain + a * (target - plain)).astype(np.uint8) for a in (0.0, 0.25, 0.5, 0.75, 1.0)]
    gains = [measure(look, blend).style_gain for blend in blends]
    assert min(np.diff(gains)) > 0.08, gains


@pytest.mark.parametrize("look", TARGETS)
def test_the_look_itself_gains_one(look: str, drawn, measure) -> None:
    g = measure(look, drawn[look])
    assert g.style_gain == pytest.approx(1.0, abs=0.15)
    assert g.d_base > 3 * g.d_floor > 0


@pytest.mark.parametrize("look", TARGETS)
def test_base_against_itself_gains_exactly_nothing(look: str, drawn, measure) -> None:
    g = measure(look, drawn["plain"])
    assert (g.style_gain, g.colour.gain, g.patches.gain) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("look", TARGETS)
def test_another_look_gains_little(look: str, drawn, measure) -> None:
    for other in set(TARGETS) - {look}:
        assert measure(look, drawn[other]).style_gain < 0.3, other


@pytest.mark.parametrize("look", TARGETS)
def test_blur_loses_gain_in_the_patches(look: str, drawn, measure) -> None:
    sharp, soft = measure(look, drawn[look]), measure(look, _blurred(drawn[look], 2.0))
    assert soft.style_gain < sharp.style_gain - 0.08
    assert soft.patches.gain < sharp.patches.gain - 0.25
    assert soft.colour.gain == pytest.approx(sharp.colour.gain, abs=0.05)


def test_ceiling_is_one_for_a_perfect_autoencoder_and_less_for_a_soft_one(drawn, references, measure) -> None:
    look = references["photo"]
    plain = drawn["plain"]
    perfect = style_gain(plain, drawn["photo"], look, reconstructed=look)
    assert perfect.ceiling == pytest.approx(1.0, abs=1e-12)
    soft = style_gain(plain, drawn["photo"], look, reconstructed=_blurred(look, 2.0))
    assert 0.6 < soft.ceiling < 0.95
    assert soft.patches.ceiling < soft.colour.ceiling
    assert soft.style_gain == perfect.style_gain
    assert "photo/ceiling" not in measure("photo", drawn["photo"]).scalars("photo")
    assert soft.scalars("photo")["photo/patches/ceiling"] == soft.patches.ceiling


def test_the_floor_has_the_bias_of_its_counts(references) -> None:
    """Few pictures of the same look lie farther apart, and the floor grows with them: the gain stays near one."""
    rows = [references["dreamy"][:16], references["dreamy"][:4]]
    many, few = (style_gain(_render("plain", "test", len(x)), x, references["dreamy"][16:]) for x in rows)
    assert few.d_floor > 1.5 * many.d_floor
    assert many.style_gain == pytest.approx(1.0, abs=0.2)


def test_a_gauge_measures_sets_of_different_counts_afresh(drawn, references, gauges) -> None:
    small, whole = drawn["photo"][:16], drawn["photo"]
    alone = [style_gain(drawn["plain"], tuned, references["photo"]) for tuned in (small, whole)]
    assert [gauges["photo"](tuned) for tuned in (small, whole)] == alone
    assert alone[0].d_floor > alone[1].d_floor


def test_nothing_to_gain_is_not_a_number(references) -> None:
    half = references["photo"][: NUM_REFERENCES // 2]
    g = style_gain(half, half, references["photo"])
    assert g.d_base < g.d_floor
    assert np.isnan(g.style_gain)


def test_resolution_is_reduced_to_one_side(drawn, measure) -> None:
    doubled = drawn["photo"].repeat(2, axis=1).repeat(2, axis=2)
    assert measure("photo", doubled).style_gain == pytest.approx(measure("photo", drawn["photo"]).style_gain, abs=0.03)
    mixed = [doubled[0], drawn["photo"][1], drawn["photo"][2][:, :64], np.tile(drawn["photo"][3], (1, 2, 1))]
    assert SlicedWasserstein(drawn["photo"])(mixed).d > 0


def test_responses_are_those_of_the_pictures_in_order(drawn) -> None:
    ruler = SlicedWasserstein(drawn["plain"])
    whole, one = ruler.projections(drawn["photo"]), ruler.projections(drawn["photo"][7:8])
    assert all(np.allclose(whole[name][7:8], one[name], atol=1e-5) for name in whole)
    assert set_distance(sort_projections(one), sort_projections(one)).d == 0.0


def test_bad_pictures_are_refused(drawn) -> None:
    plain = drawn["plain"]
    with pytest.raises(UserError, match="smaller than side=64"):
        SlicedWasserstein(plain[:, :32, :32])
    with pytest.raises(UserError, match="uint8"):
        SlicedWasserstein(plain / 255)
    with pytest.raises(UserError, match="no images"):
        SlicedWasserstein(plain)(plain[:0])
    with pytest.raises(UserError, match="at least 20"):
        SlicedWasserstein(plain, side=16)
    with pytest.raises(UserError, match="at least 4"):
        style_gain(plain, plain, plain[:3])
    with pytest.raises(UserError, match="5 reconstructed images for 48"):
        style_gain(plain, plain, plain, reconstructed=plain[:5])
