"""Signal and noise level of every timestep."""

from __future__ import annotations

import torch
from torch import Tensor

from sdft.hardware import send
from sdft.protocols import NoiseConfig


class NoiseSchedule:
    """Scaled-linear betas in fp64, SDXL's by default; `zero_terminal_snr` rescales them so that the last step is pure
    noise (Lin et al., arXiv:2305.08891, algorithm 1). Every SNR is that of the rescaled schedule.

    Not taken from diffusers' schedulers, whose cumulative products are fp32: only 17 of the 1000 signal levels would
    have the same fp32 bits, so runs would end with other weights, and an SNR is off by up to 4e-5 of itself. A test
    compares the two.

    a, s: signal and noise level of each timestep, with z_t = a z0 + s eps and a^2 + s^2 = 1. snr: a^2 / s^2.
    """

    def __init__(self, zero_terminal_snr: bool = False, config: NoiseConfig = NoiseConfig()):
        start, end = config.beta_start**0.5, config.beta_end**0.5
        betas = torch.linspace(start, end, config.num_timesteps, dtype=torch.float64) ** 2
        a = (1 - betas).cumprod(0).sqrt()
        if zero_terminal_snr:
            a = (a - a[-1]) * a[0] / (a[0] - a[-1])
        self.a, self.s = a, (1 - a**2).sqrt()
        self.snr = a**2 / (1 - a**2)

    def __len__(self) -> int:
        return len(self.a)

    def at(self, t_B: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """(a, s) of each timestep of the CPU tensor `t_B`: B x 1 x 1 x 1, fp32, on `device`."""
        return tuple(send(x[t_B].float(), device)[:, None, None, None] for x in (self.a, self.s))


_CACHED: dict[tuple[bool, NoiseConfig], NoiseSchedule] = {}


def noise_schedule(zero_terminal_snr: bool, config: NoiseConfig) -> NoiseSchedule:
    """The schedule of a model family, computed once; not cached if its tensors are fake, as in a dry run."""
    found = _CACHED.get((zero_terminal_snr, config))
    if found is None:
        found = NoiseSchedule(zero_terminal_snr, config)
        if type(found.a) is Tensor:
            _CACHED[zero_terminal_snr, config] = found
    return found
