"""Interpolates between two models or LoRAs: both ends and the weighted sums between them, as model folders.

Knows recipes. Must not depend on what is done with the models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from annotated_types import MinLen

from sdft.merging import methods
from sdft.merging.annotations import Kind
from sdft.merging.merge import merge
from sdft.merging.recipe import Step
from sdft.merging.sources import open_source
from sdft.types import Fraction, NumThreads


def interpolate(
    a: str,
    b: str,
    out: str,
    alphas: Annotated[Sequence[Fraction], MinLen(1)] = (0.25, 0.5, 0.75),
    base: str = "nano",
    config: str = "nano",
    threads: NumThreads = 2,
) -> Iterator[tuple[str, str]]:
    """Yields (name, path) of a, of each weighted sum and of b; a model is written when the iteration reaches it.

    a, b: models, or LoRAs, which are baked into `base`, so that every model is a whole one.
    alphas: the weights of b in the sums. out: the folder to write them to.
    config: a folder or hub id with the configs and tokenizers, if no input is a folder.
    """
    steps: dict[str, Step] = {}
    ends: dict[str, str] = {}
    for key, source in (("a", a), ("b", b)):
        opened = open_source(key, source)
        ends[key] = str(opened.root)
        if opened.kind == Kind.DELTA:
            ends[key] = f"baked_{key}"
            steps[ends[key]] = Step(methods.add, {"base": base, "delta": str(opened.root)})

    def write(name: str, recipe: dict[str, Step]) -> tuple[str, str]:
        path = str(Path(out) / name)
        list(merge(recipe, path, to="folder", config=config, threads=threads))
        return name, path

    def end(key: str, source: str) -> tuple[str, str]:
        path = write(key, {ends[key]: steps[ends[key]]})[1] if ends[key] in steps else ends[key]
        return Path(source).name.removesuffix(".safetensors"), path

    yield end("a", a)
    for alpha in alphas:
        yield write(f"{alpha:g}", {**steps, "blend": Step(methods.weighted_sum, ends, {"alpha": alpha})})
    yield end("b", b)
