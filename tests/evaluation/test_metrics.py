"""Each metric moves the right way, and agrees with an independent implementation on the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import linalg, stats
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from sdft.data.sources import ToyWorld
from sdft.errors import UserError
from sdft.evaluation.grid import Axes, build_grid
from sdft.evaluation.metrics import features, loss, pixels, protocol, reference, similarity
from sdft.evaluation.metrics.protocol import GeneratedImages, MetricInputs, read_source
from sdft.evaluation.style_distance import wasserstein
from sdft.evaluation.subject_loader import SubjectLoader
from sdft.evaluation.subjects import Subject
from sdft.models.load import NANO
from sdft.sampling.samplers import Sampler

BASE = Subject("base", "nano", weights="nano")


def toy(look: str, num: int = 24, split: str = "test") -> tuple[list[np.ndarray], list[str]]:
    world = ToyWorld([look], num, split)
    samples = [world[i] for i in range(num)]
    return [sample.image_HWC for sample in samples], [sample.caption for sample in samples]


def generated(images: Sequence[np.ndarray], prompts: Sequence[str] | None = None, seeds: int = 1) -> GeneratedImages:
    """Pictures as a subject's, one prompt each, or `seeds` of each prompt in turn."""
    prompts = prompts or [f"prompt {i}" for i in range(len(images) // seeds)]
    return GeneratedImages("s", build_grid([BASE], prompts, range(seeds), Sampler(), 64, Axes()), images, nullcontext)


def inputs(**given) -> MetricInputs:
    return MetricInputs(**given)


def mean(values) -> float:
    return float(np.nanmean(values))


def blurred(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1))) for image in images]


def test_pixel_metrics_move_the_right_way() -> None:
    images, _ = toy("photo", 6)
    noisy = [np.clip(i + np.random.default_rng(0).normal(0, 12, i.shape), 0, 255).astype(np.uint8) for i in images]
    grey = [np.repeat((i @ pixels.LUMA).astype(np.uint8)[..., None], 3, axis=2) for i in images]
    flat = [(127 + (i.astype(float) - 127) / 2).astype(np.uint8) for i in images]

    def of(metric, pictures) -> float:
        return mean(metric(generated(pictures), inputs()))

    assert of(pixels.Sharpness(), blurred(images)) < 0.7 * of(pixels.Sharpness(), images)
    assert of(pixels.Noise(), noisy) > 3 + of(pixels.Noise(), images)
    assert of(pixels.Contrast(), flat) == pytest.approx(of(pixels.Contrast(), images) / 2, rel=0.02)
    assert of(pixels.Colourfulness(), grey) < 1 < 10 < of(pixels.Colourfulness(), images)


def test_pixel_metrics_by_hand() -> None:
    """Half red (255, 0, 0), half black: rg = yb x 2 = 255 or 0. White noise of the luma alone is what it is."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4, :, 0] = 255
    assert pixels.contrast(image) == pytest.approx(0.299 * 127.5)
    assert pixels.colourfulness(image) == pytest.approx(np.hypot(127.5, 63.75) + 0.3 * np.hypot(127.5, 63.75))
    white = np.random.default_rng(0).normal(128, 10, (128, 128, 1)).round().clip(0, 255).astype(np.uint8)
    assert pixels.noise(white.repeat(3, axis=2)) == pytest.approx(10, rel=0.05)


@pytest.fixture(scope="module")
def judge():
    from sdft.evaluation.clip_judge import load_judge

    return load_judge(str(NANO / "clip"))


def test_shuffled_captions_lower_adherence(judge) -> None:
    images, captions = toy("photo")
    right = similarity.Adherence()(generated(images, captions), inputs(judge=judge))
    wrong = similarity.Adherence()(generated(images, captions[7:] + captions[:7]), inputs(judge=judge))
    assert mean(right) > mean(wrong) + 0.1


def test_the_look_is_nearer_to_itself() -> None:
    """Through reduced pixels: nano's judge was trained to name subjects, not styles."""
    eyes = features.Thumbnails(4)
    source, like, unlike = ToyWorld(["dreamy"], 64, "test"), toy("dreamy", 24, "train")[0], toy("photo", 24)[0]
    given = inputs(reference=source)
    for metric in (reference.StyleDistance(), reference.CMMD(eyes), reference.KID(eyes), reference.FID(eyes, 8)):
        near, far = metric(generated(like), given), metric(generated(unlike), given)
        assert near.value < far.value, metric.info.name
        assert near.low < near.value < near.high
    near, far = (mean(reference.Similarity(eyes)(generated(images), given)) for images in (like, unlike))
    assert near > far


def test_a_copy_of_the_training_set_is_flagged() -> None:
    source = ToyWorld(["dreamy"], 40, "train")
    copies = [source[i].image_HWC for i in range(10)]
    given = inputs(training=source)
    jpeg = [np.clip(image.astype(int) + 3, 0, 255).astype(np.uint8) for image in copies]
    fresh, _ = toy("dreamy", 10)
    assert mean(similarity.Copies()(generated(copies), given)) == 1
    assert mean(similarity.Copies()(generated(jpeg), given)) == 1
    assert mean(similarity.Copies()(generated(fresh), given)) == 0
    novelty = similarity.Novelty()
    assert mean(novelty(generated(copies), given)) < 1e-3 < 0.6 < mean(novelty(generated(fresh), given))


def test_diversity_and_drift_by_hand() -> None:
    """Grey 0 and 51 of 255 are 0.2 apart; the base's are 0 and 0."""
    black, grey = (np.full((16, 16, 3), value, np.uint8) for value in (0, 51))
    one, base = generated([black, grey], seeds=2), generated([black, black], seeds=2)
    np.testing.assert_allclose(similarity.Diversity()(one, inputs(baseline=base)), [0.2, 0.2], rtol=1e-5)
    np.testing.assert_allclose(similarity.Drift()(one, inputs(baseline=base)), [0, 0.2], atol=1e-6)
    assert np.isnan(similarity.Diversity()(generated([black, grey]), inputs(baseline=base))).all()
    assert np.isnan(similarity.Drift()(base, inputs(baseline=base))).all()  # it is what is compared with


class Features(nn.Module):
    """The extractor of both sides: pictures of 8 x 8 pixels to 12 numbers."""

    num_features = 12

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        weights = torch.randn(3 * 64, 12, generator=torch.Generator().manual_seed(0))
        return (pixels_BCHW.float() / 255).flatten(1) @ weights


def two_sets() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return tuple(torch.randint(low, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=random)
                 for n, low in ((30, 0), (40, 60)))  # fmt: skip


def test_fid_is_that_of_torchmetrics() -> None:
    a, b = two_sets()
    theirs = FrechetInceptionDistance(feature=Features(), input_img_size=(3, 8, 8))
    theirs.update(b, real=True)
    theirs.update(a, real=False)
    assert reference.fid(Features()(a), Features()(b)) == pytest.approx(float(theirs.compute()), rel=1e-3)


def test_fid_by_the_matrix_square_root() -> None:
    """The published formula with scipy's square root of the product of the covariances."""
    a, b = (Features()(pixels).double().numpy() for pixels in two_sets())
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert reference.fid(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-8)


def test_kid_of_unequal_sets_by_hand() -> None:
    """30 and 40 features: the mean over all pairs, without the pairs of an image with itself."""
    a, b = (Features()(pixels).double().numpy() for pixels in two_sets())

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / 12 + 1) ** 3

    within = [(kernel(x, x).sum() - np.diag(kernel(x, x)).sum()) / (len(x) * (len(x) - 1)) for x in (a, b)]
    expected = sum(within) - 2 * kernel(a, b).mean()
    before = torch.random.get_rng_state()
    assert reference.kid(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-10)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_kid_is_that_of_torchmetrics() -> None:
    """Theirs takes the mean over random subsets; with subsets of all 30, only the 30 of 40 references vary."""
    a, b = two_sets()
    b = b[:30]
    theirs = KernelInceptionDistance(feature=Features(), subsets=2, subset_size=30)
    theirs.update(b, real=True)
    theirs.update(a, real=False)
    expected, spread = theirs.compute()
    assert float(spread) < 1e-4 * float(expected), "fp32 of large numbers"
    assert reference.kid(Features()(a), Features()(b)) == pytest.approx(float(expected), rel=1e-4)


def test_cmmd_by_hand() -> None:
    """Two and two unit vectors: pairs within a set are orthogonal (squared distance 2), across 0, 2, 2, 4."""
    e = torch.eye(2)
    near, right, far = (np.exp(-d / 200) for d in (0, 2, 4))
    expected = 1000 * (2 * right - 2 * (near + 2 * right + far) / 4)
    assert reference.cmmd(e, torch.stack([e[0], -e[1]])) == pytest.approx(expected, rel=1e-6)


def test_sliced_wasserstein_is_that_of_scipy() -> None:
    random = np.random.default_rng(0)
    for n, m in ((20, 20), (20, 35)):
        a, b = np.sort(random.normal(0, 1, (3, n))), np.sort(random.normal(0.5, 2, (3, m)))
        expected = np.mean([stats.wasserstein_distance(x, y) for x, y in zip(a, b, strict=True)])
        assert wasserstein(a, b) == pytest.approx(expected)


def test_a_vision_model_of_transformers_sees_style(tmp_path: Path) -> None:
    """A tiny untrained Dinov2; the metric is the mean cosine of its pooled outputs."""
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    torch.manual_seed(0)
    model = Dinov2Model(config)
    model.save_pretrained(tmp_path)
    size = {"height": 28, "width": 28}
    BitImageProcessor(size=size, do_center_crop=False).save_pretrained(tmp_path)
    source, (images, _) = ToyWorld(["dreamy"], 4, "test"), toy("photo", 3)
    metric = reference.Similarity(features.Vision(str(tmp_path)), "dino", "style")
    found = metric(generated(images), inputs(reference=source))
    assert metric.info.name == "dino"
    own, others = metric.extractor(images), metric.extractor([source[i].image_HWC for i in range(4)])
    expected = [np.mean([torch.cosine_similarity(a, b, 0).item() for b in others]) for a in own]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    with pytest.raises(UserError, match="no vision model could be loaded from 'nowhere/at-all'"):
        features.Vision("nowhere/at-all")(images)


def test_the_loss_of_a_better_model_is_lower(tiny_model) -> None:
    """The shipped nano against the same with its last convolution halved, on the same triples, twice the same."""
    from sdft.models.load import pretrained

    models = SubjectLoader(lambda weights="nano": pretrained(weights), "nano", torch.device("cpu"))
    one = GeneratedImages("base", [], [], lambda: models.open(BASE))
    given = inputs(held_out=read_source("held_out", "toy/photo/validation", 128))
    metric = loss.ValidationLoss(size=128, low=0.25, high=0.5, num_images=8)
    assert metric.info.name == "loss_250_500"
    good, again = metric(one, given), metric(one, given)
    with torch.no_grad():
        models.base.unet.conv_out.weight *= 0.5
    worse = metric(one, given)
    assert good == again
    assert 0 < good.value < worse.value


def test_pictures_to_compare_with_are_named_where_they_are_wrong(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "only.png")
    with pytest.raises(UserError, match=r"^reference=.*has 1 images, and this comparison needs at least 4"):
        read_source("reference", str(tmp_path), 64, protocol.MIN_REFERENCES)
    assert len(read_source("training", str(tmp_path), 64).keys) == 1
    with pytest.raises(UserError, match=r"^training=.*no such folder"):
        read_source("training", str(tmp_path / "typo"), 64)
    with pytest.raises(UserError, match=r"^reference=toy/dremy: no such folder"):
        read_source("reference", "toy/dremy", 64)
    assert read_source("reference", None, 64) is None


def test_a_distribution_needs_enough_pictures(judge) -> None:
    given = inputs(judge=judge, reference=ToyWorld(["dreamy"], 8, "test"))
    with pytest.raises(UserError, match=r"metrics\.fid: 3 images and 8 references, needs at least 50"):
        reference.FID()(generated(toy("photo", 3)[0]), given)
