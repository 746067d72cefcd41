"""The style distance: a sliced Wasserstein distance between two sets of images, which need not correspond.

Compares the distributions of pixel colours, and of small patches without their mean at several scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdft.errors import UserError
from sdft.rng import generator

Images = np.ndarray | Sequence[np.ndarray]
"""uint8 RGB, N x H x W x 3 or a sequence of H x W x 3."""
Projections = dict[str, np.ndarray]
"""`colour` or `patches/SCALE` -> the pixels or patches at K positions projected on R directions, N x R x K."""

COLOUR = "colour"
PATCH = 5
"""Side of a patch, in pixels of its scale."""
SCALES = (1, 2, 4)
"""Pixels of the reduced image that are averaged to one pixel of a patch."""
NUM_POSITIONS = {COLOUR: 12, "patches": 8}
"""Positions per image along each axis; the square of it in all."""
NUM_DIRECTIONS = {COLOUR: 48, "patches": 144}
OPPONENT = torch.tensor(
    [
        [3**-0.5, 3**-0.5, 3**-0.5],
        [2 * 2**-0.5, 0, -2 * 2**-0.5],
        [-2 * 6**-0.5, 2 * 2 * 6**-0.5, -2 * 6**-0.5],
    ]
)
"""Opponent colours: lightness, red - blue, green - both. Hue has weight 2: it varies about half as much in images."""
MAX_PIXELS = 2**22
"""Pixels per batch: 4 images of 1024 x 1024, 50 MB as floats."""


@dataclass(frozen=True)
class Distance:
    """Sliced Wasserstein-1 distances in units of a spread; `d` is the mean of the two parts."""

    d: float
    colour: float
    patches: float


class SlicedWasserstein:
    """The distance of a set of images to a fixed set of reference images of a style.

    d = (colour + patches) / 2. Each is a sliced Wasserstein-1 distance divided by a spread: the root mean square, over
    directions, of the standard deviation along a direction. So both are in units of the width
    of a distribution and neither dominates; patches is the mean over scales. The power is 1 because W1 is linear in
    mixtures: a set of which a share s has the style is 1 - s times as far from it. Source: Bonneel et al. 2015.

    reference: images of the style.
    contrast: images without the style: the spread is then that of both sets with equal weight. Distances with
        different contrasts have different units. By default, the spread is that of the reference.
    side: every image is first reduced (antialiased) until its shorter edge has this many pixels, so that a scale
        means the same at any resolution; 64 for nano, 256 keeps the brush strokes of a 1024-pixel image. Smaller
        images raise UserError: enlarging would blur them, and sharpness is part of style.
    seed: of the directions and positions.
    """

    def __init__(self, reference: Images, contrast: Images | None = None, side: int = 64, seed: int = 0):
        if side < PATCH * max(SCALES):
            raise UserError(f"side={side}: patches need at least {PATCH * max(SCALES)} pixels")
        self.side, self.seed = side, seed
        pool = [self._project(images) for images in (reference, contrast) if images is not None]
        self._spread = {name: _spread([projected[name] for projected in pool]) for name in pool[0]}
        self.reference, self.contrast = self._in_spreads(pool[0]), self._in_spreads(pool[-1])

    def __call__(self, images: Images) -> Distance:
        """The distance of `images` to the reference."""
        return self.between(self.projections(images), self.reference)

    def between(self, a: Projections, b: Projections) -> Distance:
        """The distance of two sets from their projections; symmetric."""
        return set_distance(sort_projections(a), sort_projections(b))

    def projections(self, images: Images) -> Projections:
        """Projections in units of the spread; the distance of any subset follows from them without the images."""
        return self._in_spreads(self._project(images))

    def _in_spreads(self, projected: Projections) -> Projections:
        return {name: r / np.float32(self._spread[name]) for name, r in projected.items()}

    def _project(self, images: Images) -> Projections:
        batches = [dict(self._project_batch(x_BCHW)) for x_BCHW in _reduced(images, self.side)]
        return {name: np.concatenate([batch[name].numpy() for batch in batches]) for name in batches[0]}

    def _project_batch(self, x_BCHW: Tensor) -> Iterator[tuple[str, Tensor]]:
        pixels_BDK = _windows(x_BCHW, 1, positions(COLOUR, self.seed))
        yield COLOUR, directions(COLOUR, self.seed) @ pixels_BDK
        for scale in SCALES:
            patches_BDK = _windows(F.avg_pool2d(x_BCHW, scale), PATCH, positions("patches", self.seed))
            yield f"patches/{scale}", directions("patches", self.seed) @ patches_BDK


def wasserstein(a_RN: np.ndarray, b_RM: np.ndarray) -> float:
    """Mean over rows of the Wasserstein-1 distance of two samples on a line, each row sorted; exact for N != M.

    W1 = integral over u in [0, 1] of |Qa(u) - Qb(u)|, with quantile functions that step at i/N and j/M.
    """
    n, m = a_RN.shape[1], b_RM.shape[1]
    if n == m:
        return float(np.abs(a_RN - b_RM).mean(dtype=np.float64))
    # Steps in units of 1 / (n m), so that they are whole numbers.
    steps = np.union1d(np.arange(n + 1) * m, np.arange(m + 1) * n)
    width, at = np.diff(steps), steps[:-1]
    return float((np.abs(a_RN[:, at // m] - b_RM[:, at // n]) @ (width / (n * m))).mean())


def sort_projections(projections: Mapping[str, np.ndarray]) -> Projections:
    """The projections of all images on each direction, sorted: R x NK."""
    return {name: np.sort(r.swapaxes(0, 1).reshape(r.shape[1], -1), axis=1) for name, r in projections.items()}


def set_distance(a: Projections, b: Projections) -> Distance:
    """The distance of two sets from their sorted projections."""
    parts = {name: wasserstein(a[name], b[name]) for name in a}
    colour = parts.pop(COLOUR)
    patches = sum(parts.values()) / len(parts)
    return Distance((colour + patches) / 2, colour, patches)


@lru_cache
def positions(part: str, seed: int) -> Tensor:
    """One random point in each cell of a grid over the unit square, K x 2; the same in every image."""
    n = NUM_POSITIONS[part]
    cells = torch.cartesian_prod(torch.arange(n), torch.arange(n))
    return (cells + torch.rand((n * n, 2), generator=generator(seed, f"style {part} places"))) / n


@lru_cache
def directions(part: str, seed: int) -> Tensor:
    """Random unit vectors over opponent colours or the patch basis, as filters of pixel values, R x D.

    They come in orthogonal sets, which cover the sphere more evenly than independent vectors (Rowland et al. 2019).
    """
    basis_ED = OPPONENT if part == COLOUR else patch_basis()
    width = len(basis_ED)
    g = generator(seed, f"style {part} directions")
    sets = torch.linalg.qr(torch.randn((-(-NUM_DIRECTIONS[part] // width), width, width), generator=g)).Q
    return sets.reshape(-1, width)[: NUM_DIRECTIONS[part]] @ basis_ED


def patch_basis() -> Tensor:
    """The basis in which patches are projected: DCT-II waves of each opponent colour, 72 x 75.

    Without the constant wave, so that the mean colour of a patch has no effect. Each wave is weighted by its frequency:
    amplitudes of images fall as 1/f, so all waves contribute equally, fine texture as well as gradients.
    """
    k = torch.arange(PATCH, dtype=torch.float64)
    waves = torch.cos(math.pi / PATCH * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / PATCH)
    waves[0] /= math.sqrt(2)
    planes = torch.einsum("uy,vx->uvyx", waves, waves).reshape(PATCH**2, PATCH**2)
    frequency = torch.cartesian_prod(k, k).square().sum(1).sqrt()
    weighted = (planes * frequency[:, None])[1:]
    return torch.kron(OPPONENT.double(), weighted).float()


def _reduced(images: Images, side: int) -> Iterator[Tensor]:
    """Batches of pixels in [0, 1], B x 3 x H x W, resized to `side` pixels along the shorter edge, in order."""
    if len(images) == 0:
        raise UserError("there are no images to compare")
    start = 0
    while start < len(images):
        stop, shape = start + 1, images[start].shape
        at_once = MAX_PIXELS // math.prod(shape[:2])
        while stop < min(len(images), start + at_once) and images[stop].shape == shape:
            stop += 1
        batch = np.stack([images[i] for i in range(start, stop)])
        if batch.dtype != np.uint8 or batch.ndim != 4 or batch.shape[-1] != 3:
            raise UserError(f"images are uint8 of shape (h, w, 3), not {batch.dtype} of shape {shape}")
        h, w = shape[:2]
        if min(h, w) < side:
            raise UserError(f"an image of {h}x{w} is smaller than side={side}; lower side for all sets")
        x_BCHW = torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255
        if min(h, w) > side:
            size_hw = [round(edge * side / min(h, w)) for edge in (h, w)]
            x_BCHW = F.interpolate(x_BCHW, size_hw, mode="bilinear", antialias=True)
        yield x_BCHW
        start = stop


def _windows(x_BCHW: Tensor, window: int, places_K2: Tensor) -> Tensor:
    """Square windows at positions in the unit square, B x (3 window window) x K."""
    b, _, h, w = x_BCHW.shape
    room = torch.tensor([h - window + 1, w - window + 1])
    top, left = (places_K2 * room).long().T
    inside = torch.arange(window)
    rows = top[None, None] + inside[:, None, None]
    columns = left[None, None] + inside[None, :, None]
    return x_BCHW[:, :, rows, columns].reshape(b, 3 * window**2, -1)


def _spread(sets: Sequence[np.ndarray]) -> float:
    """Root mean square, over directions, of the standard deviation in the union of sets with equal weight."""
    mean_R = np.mean([r.mean(axis=(0, 2), dtype=np.float64) for r in sets], axis=0)
    variances = [np.square(r - mean_R[:, None].astype(r.dtype)).mean(dtype=np.float64) for r in sets]
    spread = math.sqrt(np.mean(variances))
    # Images of one flat colour have no spread; their distances keep the unit of pixel values from 0 to 1.
    return spread if spread > 1e-4 else 1.0
