"""Averages of the weights over a run whose width is chosen after it (post-hoc EMA; Karras et al., arXiv:2312.02696).

The power-function average of width s after t optimizer steps is sum_i w(i) theta(i), where theta(i) are the weights
after step i and w(i) = (i / t)^(g + 1) - ((i - 1) / t)^(g + 1). The exponent g follows from s, the standard deviation
of this profile relative to t (equation 23 there): s = sqrt(g + 1) / ((g + 2) sqrt(g + 3)). A run keeps two such
averages, and copies of them at a few steps; any other profile is approximated by a sum of these copies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdft.errors import UserError
from sdft.formats.output import atomic_output

FOLDER = "averages"
MAX_WIDTH = 12**-0.5
"""Width of the plain mean of all steps (g = 0), 0.289."""


def exponent(width: float) -> float:
    """The exponent g of a width: the largest root of g^3 + 7 g^2 + (16 - s^-2) g + 12 - s^-2 (Algorithm 2 there).

    Raises UserError for a width that is not above 0 and at most 0.289, that of the mean of all steps.
    """
    if not 0 < width <= MAX_WIDTH + 1e-9:
        raise UserError(f"width={width:g}: must be above 0 and at most {MAX_WIDTH:.3f}, the mean of all steps")
    inverse = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(roots.real.max()))


def width_of(g: float) -> float:
    """The width of an exponent."""
    return math.sqrt(g + 1) / ((g + 2) * math.sqrt(g + 3))


def decay(g: float, step: int) -> float:
    """By which the average is multiplied at a step, counted from 1: (1 - 1 / t)^(g + 1)."""
    return (1 - 1 / step) ** (g + 1)


def cumulative(g: float, step: int, until: int) -> np.ndarray:
    """The share of the steps up to i in the average after `step`, for i = 1 ... until."""
    return np.minimum(np.arange(1, until + 1) / step, 1.0) ** (g + 1)


class Solution(NamedTuple):
    """Factors of the copies, and the relative error of the profile that they give."""

    factors: np.ndarray
    error: float


def solve(kept: Sequence[tuple[float, int]], width: float, step: int) -> Solution:
    """The factors of kept averages, (width, step) each, whose sum comes nearest to the average of `width` after `step`.

    The cumulative profiles are fitted, by least squares, with factors that add up to 1: weights that change little
    from step to step are then averaged without error, and an error of the profile counts by how many steps it moves
    weight. The paper fits the profiles themselves. The error is the root of the sum of squares of the difference of
    the profiles, relative to that of the wanted one.
    """
    target = cumulative(exponent(width), step, step)
    columns = np.stack([cumulative(exponent(w), t, step) for w, t in kept])
    n = len(kept)
    # Lagrange's equations of the constrained least squares; the pseudo-inverse, as neighbours are nearly dependent.
    system = np.zeros((n + 1, n + 1))
    system[:n, :n], system[n, :n], system[:n, n] = columns @ columns.T, 1.0, 1.0
    factors = (np.linalg.pinv(system, rcond=1e-13, hermitian=True) @ np.append(columns @ target, 1.0))[:n]
    wanted = np.diff(target, prepend=0.0)
    found = np.diff(factors @ columns, prepend=0.0)
    return Solution(factors, float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)))


@dataclass(frozen=True)
class KeptAverages:
    """The copies in a run folder. Raises UserError if there are none."""

    folder: Path

    @property
    def steps(self) -> dict[int, Path]:
        """Step -> file."""
        found = (self.folder / FOLDER).glob("step_*.safetensors")
        return {int(path.stem.removeprefix("step_")): path for path in sorted(found)}

    def rebuild(self, width: float, step: int | None = None) -> tuple[dict[str, Tensor], float]:
        """The weights averaged over `width`, in fp32, after `step`, by default the last one; and the relative error
        of the profile (see `solve`)."""
        files = self.steps
        if not files:
            raise UserError(f"{self.folder / FOLDER}: has no averages; train with callbacks=power_averages")
        last = max(files) if step is None else step
        if last not in files:
            raise UserError(f"{self.folder / FOLDER}: has no averages of step {last}; there are {sorted(files)}")
        exponent(width)  # refuses it
        kept = [(w, t, name) for t, file in files.items() if t <= last for w, name in widths_in(file).items()]
        solution = solve([(w, t) for w, t, _ in kept], width, last)
        total: dict[str, Tensor] = {}
        for t, file in files.items():
            if t > last:
                continue
            factors = {name: f for (_, at, name), f in zip(kept, solution.factors, strict=True) if at == t}
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118  not a dict
                    name, _, parameter = key.partition("/")
                    part = opened.get_tensor(key).double() * factors[name]
                    total[parameter] = total[parameter] + part if parameter in total else part
        return {name: value.float() for name, value in total.items()}, solution.error


def widths_in(file: Path) -> dict[float, str]:
    """The widths of the averages in a file -> prefix of the names of their tensors."""
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        return {float(text): text for text in metadata["widths"].split(",")}
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise UserError(f"{file}: is not a copy of averages of this project; delete it") from error


def write_averages(file: Path, averages: Mapping[float, Mapping[str, Tensor]]) -> None:
    """Write the averages of one step, whole or not at all. averages: width -> parameter -> value."""
    tensors = {f"{width:g}/{name}": v.contiguous().cpu() for width, own in averages.items() for name, v in own.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_output(file, overwrite=True) as path:
        save_file(tensors, path, {"widths": ",".join(f"{width:g}" for width in averages)})


def snapshot_steps(count: int, num_steps: int) -> set[int]:
    """The steps of copies: evenly spread, the last step among them."""
    return {max(1, round(num_steps * (n + 1) / count)) for n in range(count)}

