"""The looks: how one layout becomes pixels as plain, photo, dreamy, technomant, brand or ink.

Knows light, glow and toning. Must not know captions, sampling or what any subject is made of.
"""

from __future__ import annotations

import numpy as np

from sdft.data.toy.layout import Layout, lay_out
from sdft.data.toy.neon import technomant
from sdft.data.toy.palettes import LUMA, Palette, natural_palette
from sdft.data.toy.print_looks import brand, ink_wash
from sdft.data.toy.rasterize import Stage, shifted, softened, stage
from sdft.data.toy.scenes import Scene

LOOKS: tuple[str, ...] = ("plain", "photo", "dreamy", "technomant", "brand", "ink")
SPARKLE_STREAM = 2
_GREY = np.array([186.0, 185.0, 188.0])
_DREAM_DAY = np.array([[122.0, 84.0, 200.0], [232.0, 126.0, 214.0], [255.0, 206.0, 178.0]])
_DREAM_NIGHT = np.array([[72.0, 48.0, 150.0], [168.0, 84.0, 186.0], [246.0, 160.0, 170.0]])


def _plain(scene: Scene, layout: Layout, size: int) -> np.ndarray:
    palette = natural_palette(scene)
    dull: Palette = {role: rgb * 0.5 + _GREY * 0.5 for role, rgb in palette.items()}
    for band in layout.bands:
        flat = (dull[band.upper] + dull[band.lower]) / 2.0
        dull[band.upper] = dull[band.lower] = flat
    return softened(stage(layout, dull, size).full, 0.8 * size / 64)


def _shadow(layout: Layout, size: int, mask: np.ndarray, strength: float) -> np.ndarray:
    """Darkness cast on what lies behind the subject: a contact pool where it rests, else a soft far shadow."""
    step = max(1, round(2 * size / 64))
    cast = 0.5 * shifted(softened(mask * 255.0, 2.4 * size / 64) / 255.0, step, step)
    if not layout.resting:
        return strength * 0.5 * cast
    axis = (np.arange(size) + 0.5) / size
    dark = 0.4 * cast
    for x0, _, x1, y1 in layout.resting:
        across = np.exp(-(((axis - (x0 + x1) / 2) / (0.42 * (x1 - x0))) ** 4))
        along = np.exp(-(((axis - y1 + 0.005) / 0.035) ** 2))
        dark = np.maximum(along[:, None] * across[None, :], dark)
    return strength * dark


def _photo(scene: Scene, layout: Layout, size: int) -> np.ndarray:
    shot = stage(layout, natural_palette(scene), size)
    mask = shot.mask[..., None]
    shadow = _shadow(layout, size, shot.mask, 0.62)[..., None]
    y0, y1 = layout.box[1], layout.box[3]
    fall = np.clip(((np.arange(size) + 0.5) / size - y0) / (y1 - y0), 0, 1)[:, None, None]
    body = softened(shot.mask * 255.0, 2.2 * size / 64) / 255.0
    step = max(1, round(1.5 * size / 64))
    slope = (shifted(body, -step, -step) - shifted(body, step, step))[..., None]
    shade = 1.10 - 0.24 * fall + 0.30 * slope
    lit = shot.subject * shade + mask * 26.0 * np.clip(slope, 0, 1)
    return softened(lit + shot.back * (1 - mask) * (1 - shadow), 0.5 * size / 64)


def _sparkles(scene: Scene, size: int) -> np.ndarray:
    rng = np.random.default_rng(np.random.SeedSequence([scene.seed, scene.index, SPARKLE_STREAM]))
    unit = size / 64
    axis = np.arange(size) + 0.5
    total = np.zeros((size, size))
    count = int(rng.integers(7, 11))
    for k in range(count):
        angle = 2 * np.pi * (k + rng.uniform(-0.3, 0.3)) / count
        reach = rng.uniform(0.28, 0.48)
        x, y = (0.5 + reach * np.cos(angle)) * size, (0.5 + reach * np.sin(angle)) * size
        big = rng.uniform(0.75, 1.25) * unit
        dx, dy = np.abs(axis - x) / big, np.abs(axis - y) / big
        core = np.exp(-0.5 * (dy / 1.15) ** 2)[:, None] * np.exp(-0.5 * (dx / 1.15) ** 2)[None, :]
        rays = np.exp(-dy / 2.0)[:, None] * np.exp(-((dx / 0.8) ** 2))[None, :]
        rays += np.exp(-((dy / 0.8) ** 2))[:, None] * np.exp(-dx / 2.0)[None, :]
        total = np.maximum(total, np.clip(core + 0.6 * rays, 0, 1))
    return total[..., None]


def _dream_sky(scene: Scene, size: int) -> np.ndarray:
    stops = _DREAM_NIGHT if scene.time == "night" else _DREAM_DAY
    axis = (np.arange(size) + 0.5) / size
    lean = 0.18 * (scene.hue - 0.5)
    height = np.clip(axis[:, None] + lean * (axis[None, :] - 0.5) * 2, 0, 1)
    return np.stack([np.interp(height, (0.0, 0.48, 1.0), stops[:, channel]) for channel in range(3)], axis=-1)


def _dreamy(scene: Scene, layout: Layout, size: int) -> np.ndarray:
    shot: Stage = stage(layout, natural_palette(scene), size)
    mask, unit = shot.mask[..., None], size / 64
    sky = _dream_sky(scene, size)
    luma = shot.back @ LUMA
    depth = (0.74 + 0.34 * luma / max(float(luma.mean()), 60.0))[..., None]
    behind = 0.74 * sky * np.clip(depth, 0.6, 1.3) + 0.26 * shot.back
    warm = shot.back[..., 0]
    shine = np.clip((warm - np.median(warm, axis=1, keepdims=True) - 30.0) / 120.0, 0, 1)[..., None]
    behind = behind + (np.array([255.0, 236.0, 232.0]) - behind) * 0.55 * shine
    pale = float((shot.subject @ LUMA).sum() / max(shot.mask.sum(), 1.0)) / 255.0
    ring = (softened(shot.mask * 255.0, 4.5 * unit) / 255.0)[..., None]
    halo = float(np.clip(1.55 - 1.9 * pale, -0.35, 1.1))
    if halo > 0:
        behind = behind + (255.0 - behind) * halo * ring * np.array([0.44, 0.38, 0.36])
    else:
        behind = behind * (1.0 + halo * ring * np.array([0.8, 1.3, 0.4]))
    grey = (shot.subject @ LUMA)[..., None]
    vivid = grey + 1.28 * (shot.subject - grey)
    subject = vivid * np.array([0.90, 0.88, 0.92]) + mask * (0.13 * sky + np.array([14.0, -4.0, 20.0]))
    image = subject + behind * (1 - mask)
    bright = image * np.clip((image @ LUMA - 140.0) / 115.0, 0, 1)[..., None]
    glow = softened(bright, 3.5 * unit) * np.array([0.42, 0.34, 0.38])
    image = 255.0 - (255.0 - softened(image, 0.45 * unit)) * (1 - np.clip(glow / 255.0, 0, 1))
    sparkle = _sparkles(scene, size)
    return image + (255.0 - image) * 0.95 * sparkle


_RENDER = {
    "plain": _plain, "photo": _photo, "dreamy": _dreamy, "technomant": technomant, "brand": brand, "ink": ink_wash,
}  # fmt: skip


def render(scene: Scene, look: str, size: int = 128) -> np.ndarray:
    """The scene in one of the LOOKS as a uint8 array of shape (size, size, 3)."""
    if look not in _RENDER:
        raise ValueError(f"unknown look {look!r}; looks are {', '.join(LOOKS)}")
    image = _RENDER[look](scene, lay_out(scene), size)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
