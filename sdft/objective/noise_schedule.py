"""Signal and noise level of every timestep."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000


class NoiseSchedule:
    """SDXL's scaled-linear betas; `zero_terminal_snr` rescales them so that the last step is pure noise.

    The rescaling (Lin et al., arXiv:2305.08891, algorithm 1) comes first: every SNR is that of the rescaled schedule.
    """

    def __init__(self, zero_terminal_snr: bool = False, beta_start: float = 0.00085, beta_end: float = 0.012):
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
        a = (1 - betas).cumprod(0).sqrt()
        if zero_terminal_snr:
            a = (a - a[-1]) * a[0] / (a[0] - a[-1])
        self.a, self.s = a, (1 - a**2).sqrt()
        self.snr = a**2 / (1 - a**2)

    def at(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) of each timestep, B x 1 x 1 x 1, fp32."""
        t = t_B.cpu()
        return tuple(x[t].float().to(t_B.device)[:, None, None, None] for x in (self.a, self.s))
