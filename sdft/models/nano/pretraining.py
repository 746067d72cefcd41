"""Objectives that train nano's VAE and its CLIP judge. Only for building nano itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPModel

from sdft.batch import Batch, LossReport
from sdft.models.nano.build import tokenizer
from sdft.protocols import Objective
from sdft.rng import Draws
from sdft.types import NonNegative


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
    """

    def __init__(self, words: Sequence[str], noise: NonNegative = 0.05):
        self.tokenizer, self.noise = tokenizer(words, "<|endoftext|>"), noise

    def __call__(self, clip: CLIPModel, batch: Batch, draws: Draws) -> LossReport:
        """The mean of the two cross entropies, and the top-1 accuracy of texts."""
        assert batch.pixels_BCHW is not None
        x = batch.pixels_BCHW
        x = x + self.noise * draws.normal("pixel noise", x.shape[1:]).to(x)
        blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        x = torch.lerp(x, blurred, draws.uniform("blur").to(x)[:, None, None, None])
        # Padding to the longest caption is enough here: only the position of the first EOS is read.
        ids = self.tokenizer(list(batch.captions), padding=True, return_tensors="pt").input_ids.to(x.device)
        out = clip(input_ids=ids, pixel_values=x)
        same = (ids[:, None] == ids[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        logits = out.logits_per_image.float()
        by_image = -(target * logits.log_softmax(1)).sum(1)
        by_text = -(target * logits.T.log_softmax(1)).sum(1)
        hit = same.gather(1, logits.argmax(1, keepdim=True)).squeeze(1)
        return LossReport((by_image + by_text) / 2, {"hit": hit})
