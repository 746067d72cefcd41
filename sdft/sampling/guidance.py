"""Classifier-free guidance and its rescaling."""

from __future__ import annotations

import torch
from torch import Tensor

from sdft.batch import Conditioning
from sdft.protocols import DiffusionModel
from sdft.sampling.samplers import Sampler


def guided(model: DiffusionModel, z_in: Tensor, t: Tensor, cond: Conditioning, sampler: Sampler) -> Tensor:
    """The prediction at timestep t with classifier-free guidance `sampler.cfg`; 1 is without guidance.

    cond: of the negative prompts, then of the prompts; of the prompts only if cfg is 1. `sampler.rescale` matches the
    standard deviation of the result to that of the prompts' prediction (Lin et al., arXiv:2305.08891, section 3.4).
    """
    if sampler.cfg == 1:
        return model.denoise(z_in, t.expand(len(z_in)), cond)
    without, with_prompt = model.denoise(torch.cat([z_in] * 2), t.expand(2 * len(z_in)), cond).chunk(2)
    guided = without + sampler.cfg * (with_prompt - without)
    if sampler.rescale:
        dims = (1, 2, 3)
        matched = guided * (with_prompt.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
        guided = torch.lerp(guided, matched, sampler.rescale)
    return guided
