"""Objectives that train nano's VAE and its CLIP judge. Only for building nano itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPModel, VisionTextDualEncoderModel

from sdft.batch import Batch, LossReport
from sdft.models.nano.build import tokenizer
from sdft.protocols import Objective
from sdft.rng import Draws, seed_of
from sdft.types import Fraction, Index, NonNegative


class Reconstruction(Objective):
    """Reconstruction error of images through the VAE: L1, plus terms by these weights.

    squared: squared error. high_pass: L1 of high frequencies, for sharpness. chroma: L1 of colour. kl: KL divergence.
    balance: keeps the standard deviation of each latent channel at 1, so that one scaling factor fits all.
    """

    def __init__(
        self,
        squared: NonNegative = 2.0,
        high_pass: NonNegative = 1.0,
        chroma: NonNegative = 0.5,
        kl: NonNegative = 2e-6,
        balance: NonNegative = 0.02,
    ):
        self.squared, self.high_pass, self.chroma, self.kl, self.balance = squared, high_pass, chroma, kl, balance

    def __call__(self, vae: AutoencoderKL, batch: Batch, draws: Draws) -> LossReport:
        """The loss of each image, and its PSNR in dB."""
        assert batch.pixels_BCHW is not None
        x = batch.pixels_BCHW
        posterior = vae.encode(x).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        z = mean + (0.5 * logvar).exp() * draws.normal("posterior", mean.shape[1:]).to(mean)
        y = vae.decode(z.to(x.dtype)).sample.float()
        error = y - x
        dims = (1, 2, 3)
        mse_B = error.square().mean(dims)
        per_sample = (
            error.abs().mean(dims)
            + self.squared * mse_B
            + self.high_pass * _high_pass(error).abs().mean(dims)
            + self.chroma * (error - error.mean(1, keepdim=True)).abs().mean(dims)
            + self.kl * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dims)
            + self.balance * (mean.std(dim=(0, 2, 3)).log().square().sum() + mean.mean(dim=(0, 2, 3)).square().sum())
        )
        # Pixels lie in [-1, 1]: the peak is 2, and 10 log10(2^2) = 6.02 dB.
        psnr_B = 6.0206 - 10 * (y.clamp(-1, 1) - x).square().mean(dims).clamp_min(1e-10).log10()
        return LossReport(per_sample, {"psnr": psnr_B, "latent_std": mean.std(dim=(0, 2, 3))})


def _high_pass(x_BCHW: Tensor) -> Tensor:
    return x_BCHW - F.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)


class Contrastive(Objective):
    """CLIP's symmetric contrastive loss; equal texts of a batch share the target.

    Noise and blur make the judge insensitive to artefacts of a small VAE.

    words: vocabulary of the tokenizer.
    noise: standard deviation of the noise added to the pixels.
    blur: largest share of each image's blurred copy (mean of 3 x 3 pixels) that is mixed into it.
    subjects: nouns. Each image is also compared with `num_wrong` copies of its caption in which another of them stands
        in the place of one: the other captions of a batch are too different to teach which two subjects a pair has
        (hard negatives, as of Yuksekgonul et al., arXiv:2210.01936).
    """

    def __init__(
        self,
        words: Sequence[str],
        noise: NonNegative = 0.05,
        blur: Fraction = 0.5,
        subjects: Sequence[str] = (),
        num_wrong: Index = 2,
    ):
        self.tokenizer, self.noise, self.blur = tokenizer(words, "<|endoftext|>"), noise, blur
        self.subjects, self.num_wrong = tuple(subjects), num_wrong if subjects else 0

    def __call__(self, clip: CLIPModel | VisionTextDualEncoderModel, batch: Batch, draws: Draws) -> LossReport:
        """The mean of the two cross entropies, and the top-1 accuracy of texts."""
        assert batch.pixels_BCHW is not None
        x = batch.pixels_BCHW
        x = x + self.noise * draws.normal("pixel noise", x.shape[1:]).to(x)
        blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        x = torch.lerp(x, blurred, self.blur * draws.uniform("blur").to(x)[:, None, None, None])
        texts, num = [*batch.captions, *self._wrong(batch.captions, draws)], len(batch.captions)
        # Padding to the longest caption is enough here: only the position of the first EOS is read.
        ids_TL = self.tokenizer(texts, padding=True, return_tensors="pt").input_ids.to(x.device)
        logits_BT = clip(input_ids=ids_TL, pixel_values=x).logits_per_image.float()
        same_BT = (ids_TL[:num, None] == ids_TL[None]).all(-1).float()
        by_image_B = _cross_entropy(logits_BT, same_BT)
        by_text_B = _cross_entropy(logits_BT[:, :num].T, same_BT[:, :num])
        hit_B = same_BT.gather(1, logits_BT.argmax(1, keepdim=True)).squeeze(1)
        return LossReport((by_image_B + by_text_B) / 2, {"hit": hit_B})

    def _wrong(self, captions: Sequence[str], draws: Draws) -> list[str]:
        """Captions that name another subject; of a caption without one, the caption itself."""
        found = []
        for number in range(self.num_wrong):
            for caption, key, visit in zip(captions, draws.keys, draws.visits, strict=True):
                choice = seed_of(draws.run_seed, f"wrong caption {number}", key, visit)
                found.append(with_another(caption, self.subjects, choice))
        return found


def with_another(caption: str, subjects: Sequence[str], choice: int) -> str:
    """The caption with another subject in the place of one that it names, and with the article that this one needs.

    choice: any number, which of all such captions.
    """
    named = [subject for subject in subjects if re.search(rf"\b{subject}\b", caption)]
    pairs = [(before, after) for before in named for after in subjects if after not in named]
    if not pairs:
        return caption
    before, after = pairs[choice % len(pairs)]
    text = re.sub(rf"\b{before}\b", after, caption)
    return re.sub(r"\ban? (\w)", lambda found: f"{'an' if found[1] in 'aeiou' else 'a'} {found[1]}", text)


def _cross_entropy(logits_NT: Tensor, same_NT: Tensor) -> Tensor:
    """Of each row, with all of its equal texts as targets."""
    target_NT = same_NT / same_NT.sum(1, keepdim=True)
    return -(target_NT * logits_NT.log_softmax(1)).sum(1)
