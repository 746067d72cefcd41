"""Signal and noise level of every timestep."""

from __future__ import annotations

from typing import Literal

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
    times: what the denoiser is told at each timestep.
    """

    def __init__(self, zero_terminal_snr: bool = False, config: NoiseConfig = NoiseConfig()):
        start, end = config.beta_start**0.5, config.beta_end**0.5
        betas = torch.linspace(start, end, config.num_timesteps, dtype=torch.float64) ** 2
        a = (1 - betas).cumprod(0).sqrt()
        if zero_terminal_snr:
            a = (a - a[-1]) * a[0] / (a[0] - a[-1])
        self.a, self.s = a, (1 - a**2).sqrt()
        self.snr = a**2 / (1 - a**2)
        self.times = torch.arange(config.num_timesteps)

    def __len__(self) -> int:
        return len(self.a)

    def at(self, t_B: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """(a, s) of each timestep of the CPU tensor `t_B`: B x 1 x 1 x 1, fp32, on `device`."""
        return tuple(send(x[t_B].float(), device)[:, None, None, None] for x in (self.a, self.s))


class FlowSchedule(NoiseSchedule):
    """The straight path z_t = (1 - t) z0 + t eps of rectified flow (Liu et al., arXiv:2209.03003).

    t_T: t of each timestep, in (0, 1]; by default, N of them at equal steps. The denoiser is told N t.
    """

    def __init__(self, config: NoiseConfig = NoiseConfig(), t_T: Tensor | None = None):
        num = config.num_timesteps
        t_T = torch.arange(1, num + 1, dtype=torch.float64) / num if t_T is None else t_T
        self.a, self.s, self.times = 1 - t_T, t_T, num * t_T
        self.snr = (self.a / self.s) ** 2

    @classmethod
    def matching(cls, schedule: NoiseSchedule, config: NoiseConfig = NoiseConfig()) -> FlowSchedule:
        """The path at the signal-to-noise ratios of another schedule: errors of eps compare between the two."""
        return cls(config, schedule.s / (schedule.a + schedule.s))


Kind = Literal["variance_preserving", "zero_terminal_snr", "flow", "matched_flow"]
"""`matched_flow`: the flow at the signal-to-noise ratios of `variance_preserving`."""
_CACHED: dict[tuple[Kind, NoiseConfig], NoiseSchedule] = {}


def noise_schedule(kind: Kind, config: NoiseConfig) -> NoiseSchedule:
    """The schedule of a model family, computed once; not cached if its tensors are fake, as in a dry run."""
    found = _CACHED.get((kind, config))
    if found is None:
        if kind == "matched_flow":
            found = FlowSchedule.matching(noise_schedule("variance_preserving", config), config)
        else:
            flow = kind == "flow"
            found = FlowSchedule(config) if flow else NoiseSchedule(kind == "zero_terminal_snr", config)
        if type(found.a) is Tensor:
            _CACHED[kind, config] = found
    return found
