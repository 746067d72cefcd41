"""Every method on nano's own weights, file to file, beside the plainest formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import read, write_model

from sdft import rng
from sdft.formats.importance import write_importance
from sdft.merging.compute import CHUNK_SIZE
from sdft.merging.merge import merge
from sdft.merging.recipe import METHODS, Step
from sdft.models.load import NANO

Array = np.ndarray
SEED = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """A weight of each shape in each part of nano; three models near it, and what matters to two of them."""
    folder = tmp_path_factory.mktemp("models")
    nano = {name: tensor.float() for name, tensor in read(NANO).items()}
    chosen = {(name.split("/")[0], tensor.shape): name for name, tensor in nano.items()}
    found = {"base": {name: nano[name] for name in sorted(chosen.values())}}
    for i, key in enumerate(("a", "b", "c", "f", "g")):
        noise = torch.Generator().manual_seed(i)
        draws = {name: torch.randn(one.shape, generator=noise) for name, one in found["base"].items()}
        found[key] = {name: one + 0.1 * one.std(correction=0) * draws[name] for name, one in found["base"].items()}
        if key in "fg":
            found[key] = {name: draw.square() for name, draw in draws.items()}
    for key, tensors in found.items():
        if key not in "fg":
            write_model(folder / key, tensors)
            continue
        write_importance({name.replace("/", ".", 1): x for name, x in tensors.items()}, folder / f"{key}.safetensors")
    found["folder"] = folder  # type: ignore[assignment]
    return found


def mean(*arrays: Array) -> Array:
    return sum(arrays) / len(arrays)


def cosine(x: Array, y: Array) -> float:
    return float((x * y).sum() / max(np.sqrt((x * x).sum() * (y * y).sum()), 1e-300))


def slerp(a: Array, b: Array, t: float) -> Array:
    angle = np.arccos(min(1.0, cosine(a, b)))
    if np.sin(angle) < 1e-3 or not a.any():
        return (1 - t) * a + t * b
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def median(points: list[Array]) -> Array:
    x = mean(*points)
    for _ in range(100):
        pulls = [1 / max(np.sqrt(((x - p) ** 2).sum()), 1e-12) for p in points]
        x = sum(pull * p for pull, p in zip(pulls, points, strict=True)) / sum(pulls)
    return x


def rotated(a: Array, b: Array) -> Array:
    if a.ndim < 2:
        return b
    x, y = (np.moveaxis(one, 1, -1).reshape(-1, one.shape[1]) for one in (a, b))
    u, _, v = np.linalg.svd(y.T @ x)
    return np.moveaxis((y @ u @ v).reshape(b.shape[0], *b.shape[2:], b.shape[1]), -1, 1)


def trimmed(delta: Array, density: float) -> Array:
    kept = max(1, round(density * delta.size))
    return np.where(np.abs(delta) >= np.sort(np.abs(delta).ravel())[-kept], delta, 0)


def elected(deltas: list[Array]) -> Array:
    sign = np.sign(sum(deltas))
    agree = [delta * sign > 0 for delta in deltas]
    return sum(delta * yes for delta, yes in zip(deltas, agree, strict=True)) / np.maximum(1, sum(agree))


def draws(weight: str, number: int, shape: tuple[int, ...]) -> Array:
    rows = max(1, CHUNK_SIZE // int(np.prod(shape[1:], initial=1)))
    parts = []
    for i, start in enumerate(range(0, shape[0], rows)):
        generator = rng.generator(SEED, "merging", f"{weight}/{number}", i)
        parts.append(torch.rand(min(rows, shape[0] - start), *shape[1:], generator=generator))
    return torch.cat(parts).numpy()


def dropped(weight: str, deltas: list[Array], density: float) -> list[Array]:
    return [np.where(draws(weight, i, d.shape) < np.float32(density), d / density, 0) for i, d in enumerate(deltas)]


def magprune(weight: str, deltas: list[Array], density: float, window: float) -> list[Array]:
    found = []
    for i, delta in enumerate(deltas):
        rows = np.abs(delta).reshape(1 if delta.ndim < 2 else len(delta), -1)
        ranks = rows.argsort(1, kind="stable").argsort(1, kind="stable") / max(1, rows.shape[1] - 1)
        chance = density - window / 2 + window * ranks.reshape(delta.shape)
        found.append(np.where(draws(weight, i, delta.shape) < chance.astype(np.float32), delta / chance, 0))
    return found


def stock(base: Array, x: Array, y: Array) -> Array:
    c = max(0.0, cosine(x - base, y - base))
    return base + 2 * c / (1 + c) * (mean(x, y) - base)


def towards(a: Array, b: Array, c: Array) -> Array:
    return (b - c) * np.abs(b - a) / np.maximum(np.abs(b - c) + np.abs(b - a), 1e-300)


def adaptive(base: Array, a: Array, b: Array, alpha: float) -> Array:
    share = alpha * (1 - max(0.0, cosine(a - base, b - base)))
    return base + (1 - share) * (a - base) + share * (b - base)


def fisher(a: Array, b: Array, f: Array, g: Array, floor: float) -> Array:
    least = floor * (f.mean() + g.mean()) / 2
    return ((f + least) * a + (g + least) * b) / (f + g + 2 * least)


AB, TUNED = {"a": "a", "b": "b"}, {"base": "base", "models": ["a", "b"]}
CASES: dict[str, tuple[dict, dict, Callable]] = {
    "weighted_sum": (AB, {"alpha": 0.3}, lambda w, base, a, b, c, f, g: 0.7 * a + 0.3 * b),
    "linear": (
        {"models": ["a", "b", "c"]}, {"shares": [1.0, 2.0, 5.0]},
        lambda w, base, a, b, c, f, g: (a + 2 * b + 5 * c) / 8,
    ),
    "fisher": (
        {"models": ["a", "b"], "importances": ["f", "g"]}, {"floor": 0.01},
        lambda w, base, a, b, c, f, g: fisher(a, b, f, g, 0.01),
    ),
    "add_difference": ({**AB, "c": "c"}, {"alpha": 0.7}, lambda w, base, a, b, c, f, g: a + 0.7 * (b - c)),
    "train_difference": (
        {**AB, "c": "c"}, {"alpha": 0.7}, lambda w, base, a, b, c, f, g: a + 0.7 * towards(a, b, c)
    ),
    "slerp": (AB, {"alpha": 0.3}, lambda w, base, a, b, c, f, g: slerp(a, b, 0.3)),
    "model_stock": (TUNED, {}, lambda w, base, a, b, c, f, g: stock(base, a, b)),
    "geometric_median": ({"models": ["a", "b", "c"]}, {}, lambda w, base, a, b, c, f, g: median([a, b, c])),
    "cosine_adaptive": (
        {"base": "base", **AB}, {"alpha": 0.5}, lambda w, base, a, b, c, f, g: adaptive(base, a, b, 0.5)
    ),
    "rotate": (AB, {"alpha": 0.5}, lambda w, base, a, b, c, f, g: mean(a, rotated(a, b))),
    "clamp": (
        {"merged": "c", "models": ["a", "b"]}, {},
        lambda w, base, a, b, c, f, g: np.clip(c, np.minimum(a, b), np.maximum(a, b)),
    ),
    "ties": (
        TUNED, {"density": 0.3, "alpha": 0.8},
        lambda w, base, a, b, c, f, g: base + 0.8 * elected([trimmed(a - base, 0.3), trimmed(b - base, 0.3)]),
    ),
    "dare": (
        TUNED, {"density": 0.3, "seed": SEED},
        lambda w, base, a, b, c, f, g: base + mean(*dropped(w, [a - base, b - base], 0.3)),
    ),
    "dare_ties": (
        TUNED, {"density": 0.3, "seed": SEED},
        lambda w, base, a, b, c, f, g: base + elected(dropped(w, [a - base, b - base], 0.3)),
    ),
    "della": (
        TUNED, {"density": 0.5, "window": 0.4, "seed": SEED},
        lambda w, base, a, b, c, f, g: base + elected(magprune(w, [a - base, b - base], 0.5, 0.4)),
    ),
    "add": ({"base": "a", "delta": "learned"}, {"scale": 0.4}, lambda w, base, a, b, c, f, g: a + 0.4 * (b - c)),
    "sum_of": (
        {"deltas": ["learned", "learned"]}, {"scales": [1.5, -0.5]}, lambda w, base, a, b, c, f, g: base + (b - c)
    ),
}  # fmt: skip
"""Inputs, numbers, and the formula of a weight; `learned` is the step b - c, and a delta is added to the base."""


def test_no_method_is_forgotten() -> None:
    assert CASES.keys() | {"difference"} == METHODS.keys()


@pytest.mark.parametrize("method", CASES)
def test_a_method_is_its_formula(method: str, models: dict, tmp_path: Path) -> None:
    folder, (inputs, numbers, formula) = models["folder"], CASES[method]

    def path(name: str) -> str:
        if name == "learned":
            return name
        return str(folder / (f"{name}.safetensors" if name in "fg" else name))

    placed = {key: [*map(path, one)] if isinstance(one, list) else path(one) for key, one in inputs.items()}
    steps = {"result": Step(METHODS[method], placed, numbers)}
    if "learned" in str(inputs):
        steps["learned"] = Step(METHODS["difference"], {"a": path("b"), "b": path("c")})
    if method == "sum_of":
        steps["added"] = Step(METHODS["add"], {"base": path("base"), "delta": "result"})
    list(merge(steps, str(tmp_path / "out")))
    found = read(tmp_path / "out")
    assert len(found) > 50
    for weight in found:
        arrays = [models[key][weight].double().numpy() for key in ("base", "a", "b", "c", "f", "g")]
        # A number whose magnitude is the threshold to the last bit may fall to either side.
        size = float(np.abs(arrays[0]).max() + np.abs(arrays[1] - arrays[0]).max())
        apart = np.abs(found[weight].double().numpy() - formula(weight, *arrays)) > 2e-5 * size
        assert apart.sum() <= (1 if "ties" in method or method == "della" else 0), weight
