"""The way from one model to another: both ends, LoRAs or whole models, and the weighted sums between them, on disk.

Knows recipes; must not know what the models draw.
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
from sdft.types import Count, Fraction


def interpolate(
    a: str,
    b: str,
    out: str,
    alphas: Annotated[Sequence[Fraction], MinLen(1)] = (0.25, 0.5, 0.75),
    base: str = "nano",
    config: str = "nano",
    threads: Count = 2,
) -> Iterator[tuple[str, str]]:
    """Names and places of the models on the way, the ends by their own names; each is written when it is asked for.

    a, b: the ends. A LoRA is baked into `base`, so that each model of the way is a whole one.
    alphas: the shares of b between the ends. out: the folder that they are written to.
    config: the folder or hub id that has the configs and tokenizers, where no input is a folder.
    """
    steps: dict[str, Step] = {}
    ends: dict[str, str] = {}
    for key, source in (("a", a), ("b", b)):
        opened = open_source(key, source)
        ends[key] = str(opened.root)
        if opened.kind == Kind.DELTA:
            ends[key] = f"baked_{key}"
            steps[ends[key]] = Step(methods.add, {"base": base, "delta": str(opened.root)})

    def written(name: str, recipe: dict[str, Step]) -> tuple[str, str]:
        path = str(Path(out) / name)
        list(merge(recipe, path, to="folder", config=config, threads=threads))
        return name, path

    def end(key: str, source: str) -> tuple[str, str]:
        path = written(key, {ends[key]: steps[ends[key]]})[1] if ends[key] in steps else ends[key]
        return Path(source).name.removesuffix(".safetensors"), path

    yield end("a", a)
    for alpha in alphas:
        yield written(f"{alpha:g}", {**steps, "blend": Step(methods.weighted_sum, ends, {"alpha": alpha})})
    yield end("b", b)
