"""Prior preservation without pictures: the base's own predictions are the target."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sdft.batch import Conditioning
from sdft.errors import UserError
from sdft.protocols import DiffusionModel
from sdft.types import Positive


@dataclass(frozen=True)
class NoisyBatch:
    """What the denoiser was given, and what it predicted.

    z_t, told_B: noisy latents, and what the denoiser was told of their time. mask_B1HW: of the batch, in pixels.
    """

    z_t: Tensor
    told_B: Tensor
    cond: Conditioning
    prediction: Tensor
    mask_B1HW: Tensor | None


class Prior(ABC):
    """A second loss beside that of the images: the squared difference to what the base predicts (learning without
    forgetting, Li and Hoiem, arXiv:1606.09282).

    weight: of this loss beside that of the images.
    """

    def __init__(self, weight: Positive = 1.0):
        self.weight = weight
        self._base: Callable[[], AbstractContextManager[None]] | None = None

    def attach(self, base: Callable[[], AbstractContextManager[None]]) -> None:
        """base: inside the `with`, the model computes as it did before training."""
        self._base = base

    @abstractmethod
    def __call__(self, model: DiffusionModel, noisy: NoisyBatch) -> Tensor:
        """The loss of each sample."""

    def base(self) -> AbstractContextManager[None]:
        """See `attach`."""
        assert self._base is not None, "the module attaches the base"
        return self._base()


class PriorPrediction(Prior):
    """Keeps what the base predicts for the caption of a class, while a member of it is learned.

    It takes the place of DreamBooth's class pictures (Ruiz et al., arXiv:2208.12242): the class is asked at the noisy
    latents of the training images. Costs two more passes through the denoiser, one of them without gradients.

    caption: of the class, without the new word: `a photo of a sneaker`.
    """

    def __init__(self, caption: str, weight: Positive = 1.0):
        super().__init__(weight)
        self.caption = caption

    def __call__(self, model: DiffusionModel, noisy: NoisyBatch) -> Tensor:
        with self.base(), torch.no_grad():
            target = model.denoise(noisy.z_t, noisy.told_B, self._condition(model, noisy.cond))
        prediction = model.denoise(noisy.z_t, noisy.told_B, self._condition(model, noisy.cond))
        return (prediction - target).square().mean(dim=(1, 2, 3))

    def _condition(self, model: DiffusionModel, cond: Conditioning) -> Conditioning:
        """The caption of the class, at the sizes of the batch."""
        context_1LD, pooled_1P = model.encode_prompts([self.caption])
        num = len(cond.pooled_BP)
        context_BLD, pooled_BP = context_1LD.expand(num, -1, -1), pooled_1P.expand(num, -1)
        return replace(cond, context_BLD=context_BLD, pooled_BP=pooled_BP)


class OutsidePrior(Prior):
    """Keeps what the base predicts outside of the masks of the images, where nothing is to be learned.

    Without it, what is learned inside of a mask also changes the outside, on which no loss counts. It costs one more
    pass through the denoiser, without gradients.

    Raises UserError for images without masks.
    """

    def __call__(self, model: DiffusionModel, noisy: NoisyBatch) -> Tensor:
        if noisy.mask_B1HW is None:
            raise UserError("objective/prior=outside: the images have no masks; set data.masks=true, or alpha")
        with self.base(), torch.no_grad():
            target = model.denoise(noisy.z_t, noisy.told_B, noisy.cond)
        error_B1HW = (noisy.prediction - target).square().mean(1, keepdim=True)
        outside_B1HW = 1 - F.interpolate(noisy.mask_B1HW.to(error_B1HW.dtype), error_B1HW.shape[2:], mode="area")
        return (outside_B1HW * error_B1HW).sum(dim=(1, 2, 3)) / outside_B1HW.sum(dim=(1, 2, 3)).clamp_min(1e-6)
