"""The grid of a comparison: one cell for every combination of subject, axis values, prompt and seed.

Only names and numbers; nothing is loaded or generated here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Gt, Le, MaxLen, MinLen

from sdft.errors import UserError
from sdft.evaluation.results import Value
from sdft.evaluation.subjects import FINAL, Subject
from sdft.formats.power_average import MAX_WIDTH
from sdft.sampling.samplers import Sampler, find_scheduler
from sdft.types import Fraction, Index, NonNegative, SamplerSteps, Side

Axis = Literal["sampler", "cfg", "steps", "rescale", "negative", "size", "scale", "step", "width"]
Size = Side | Annotated[Sequence[Side], MinLen(2), MaxLen(2)]
"""Side of a square in pixels, or [height, width]."""
Width = Annotated[float, Gt(0), Le(MAX_WIDTH)]
MAX_IMAGES = 1_000_000


class Axes:
    """The values of each axis. An axis that is None keeps the value of `sampler` or `size`.

    sampler: names of samplers, as `sampler.name`.
    cfg, steps, rescale, negative: options of the sampler.
    size: sides in pixels, or [height, width].
    scale: multipliers of the strengths of a subject's LoRAs; a subject without LoRAs is the same at all of them.
    step: training steps at which a run kept checkpoints (`callbacks=progress`), or `all`; the last is the final model.
    width: of the average of a run's weights (`callbacks=power_averages`); another subject is the same at all of them.

    Raises UserError for an axis without values and for a sampler that does not exist.
    """

    def __init__(
        self,
        sampler: Sequence[str] | None = None,
        cfg: Sequence[NonNegative] | None = None,
        steps: Sequence[SamplerSteps] | None = None,
        rescale: Sequence[Fraction] | None = None,
        negative: Sequence[str] | None = None,
        size: Sequence[Size] | None = None,
        scale: Sequence[float] | None = None,
        step: Sequence[Index] | Literal["all"] | None = None,
        width: Sequence[Width] | None = None,
    ):
        self.step = step
        self.values: dict[str, Sequence] = {
            name: list(dict.fromkeys(map(_hashable, values)))
            for name, values in {
                "sampler": sampler,
                "cfg": cfg,
                "steps": steps,
                "rescale": rescale,
                "negative": negative,
                "size": size,
                "scale": scale,
                "width": width,
            }.items()
            if values is not None
        }
        for name, values in self.values.items():
            if not values:
                raise UserError(f"axes.{name} is empty: give at least one value, or null")
        if step is not None and width is not None:
            raise UserError("axes.step and axes.width: averages reach to the last step; set one of them")
        for name in sampler or ():
            find_scheduler(name, "axes.sampler")


@dataclass(frozen=True)
class GenerationSettings:
    """Everything that an image depends on, besides the weights. The names and values are part of its file name."""

    prompt: str
    seed: int
    sampler: str
    steps: int
    cfg: float
    rescale: float
    negative: str
    size_hw: tuple[int, int]

    def to_sampler(self, batch_size: int) -> Sampler:
        """The sampler with these options."""
        return Sampler(self.sampler, self.steps, self.cfg, self.negative, self.rescale, batch_size)


@dataclass(frozen=True)
class GridCell:
    """One image of the grid.

    variant: name of the subject in the results: its name and the values of the competing axes, `dreamy scale 0.5`.
    scale: multiplies the strengths of the subject's LoRAs. step: of training, FINAL for the final weights.
    width: of the average of the weights; None for the weights as exported.
    axes: position among the images of the variant: prompt, seed, and the other axes that vary.
    varied: values of the competing axes.
    """

    variant: str
    subject: Subject
    scale: float
    step: int
    settings: GenerationSettings
    axes: Mapping[str, Value]
    varied: Mapping[str, Value]
    width: float | None = None

    @property
    def pair(self) -> tuple:
        """Key under which the images of two variants form a pair."""
        return tuple(self.axes.items())


def build_grid(
    subjects: Sequence[Subject],
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Sampler,
    size: Size,
    axes: Axes,
    compete: Sequence[Axis] = (),
) -> list[GridCell]:
    """All cells, by subject, then by axes, prompt and seed (which changes fastest).

    seeds: of each prompt. sampler, size: for axes without values. compete: axes whose values make variants.
    Raises UserError for an axis that cannot be used.
    """
    refuse_widths(subjects, axes.values.get("width"))
    default = {**options_of(sampler), "size": _hashable(size), "scale": 1.0, "width": None}
    steps = training_steps(subjects, axes.step)
    values = {name: axes.values.get(name, [value]) for name, value in default.items()} | {"step": steps}
    for name in compete:
        if len(values[name]) < 2:
            raise UserError(f"compete={list(compete)}: axes.{name} has fewer than two values; give some")
    count = len(subjects) * len(prompts) * len(seeds) * prod(map(len, values.values()))
    if count > MAX_IMAGES:
        raise UserError(f"{count:,} images of subjects, axes, prompts and seeds are too many; lower seeds= or the axes")
    shown = [name for name in values if len(values[name]) > 1]
    found = []
    for subject in subjects:
        for point in _points(subject, values, compete):
            given = {name: _value(point[name]) for name in shown if point[name] is not None}
            varied = {name: value for name, value in given.items() if name in compete}
            other = {name: value for name, value in given.items() if name not in compete}
            variant = " ".join([subject.name, *(f"{name} {_short(value)}" for name, value in varied.items())])
            for prompt, seed in itertools.product(prompts, seeds):
                found.append(_cell(variant, subject, point, prompt, seed, other, varied))
    return found


def options_of(sampler: Sampler) -> dict[str, Value]:
    """The options of a sampler by the names of their axes."""
    return {
        "sampler": sampler.name,
        "cfg": sampler.cfg,
        "steps": sampler.steps,
        "rescale": sampler.rescale,
        "negative": sampler.negative,
    }


def size_text(size: Size) -> str:
    """Width x height, as `96x64`."""
    h, w = (size, size) if isinstance(size, int) else size
    return f"{w}x{h}"


def training_steps(subjects: Sequence[Subject], steps: Sequence[int] | Literal["all"] | None) -> list[int]:
    """The training steps to load; by default only FINAL. Raises UserError for a step without a checkpoint."""
    if steps is None:
        return [FINAL]
    known = sorted({step for subject in subjects for step in subject.steps})
    if not known:
        raise UserError("axes.step: none of the subjects is a run with checkpoints; train with callbacks=progress")
    if steps == "all":
        return known
    for step in steps:
        if step not in known:
            raise UserError(f"axes.step={step}: no subject has a checkpoint of that step; there are {known}")
    return list(steps)


def refuse_widths(subjects: Sequence[Subject], widths: Sequence[float] | None) -> None:
    """Raise UserError for widths of averages if no subject keeps any."""
    if widths and not any(subject.has_averages for subject in subjects):
        raise UserError("axes.width: none of the subjects is a run with averages; train with callbacks=power_averages")


def read_prompts(prompts: Sequence[str] | str) -> list[str]:
    """The prompts, or the lines of a text file; empty lines and those that start with # are left out."""
    if isinstance(prompts, str):
        path = Path(prompts).expanduser()
        try:
            prompts = path.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise UserError(f"prompts={path}: cannot be read ({error.strerror}); a list is [a cat, a dog]") from error
        except UnicodeDecodeError as error:
            raise UserError(f"prompts={path}: is not UTF-8 text (byte {error.start})") from error
        prompts = [line.strip() for line in prompts if line.strip() and not line.lstrip().startswith("#")]
        if not prompts:
            raise UserError(f"prompts={path}: holds no prompt; write one on each line")
    return list(dict.fromkeys(prompts))


def _points(subject: Subject, values: Mapping[str, Sequence], compete: Sequence[str]) -> Iterator[dict]:
    """Every combination of axis values. On a competing axis that does not apply to the subject, there is only one."""
    own = dict(values)
    if "scale" in compete and not subject.loras:
        own["scale"] = [None]
    if subject.steps:
        own["step"] = [step for step in values["step"] if step == FINAL or step in subject.steps]
    elif "step" in compete:
        own["step"] = [None]
    if not subject.has_averages and "width" in compete:
        own["width"] = [None]
    for point in itertools.product(*own.values()):
        yield dict(zip(own, point, strict=True))


def _cell(
    variant: str, subject: Subject, point: Mapping, prompt: str, seed: int, other: Mapping, varied: Mapping
) -> GridCell:
    size, step = point["size"], point["step"]
    settings = GenerationSettings(
        prompt=prompt,
        seed=seed,
        sampler=point["sampler"],
        steps=point["steps"],
        cfg=point["cfg"],
        rescale=point["rescale"],
        negative=point["negative"],
        size_hw=size if isinstance(size, tuple) else (size, size),
    )
    scale = 1.0 if point["scale"] is None else point["scale"]
    # The last step of a run is the exported model.
    step = FINAL if step is None or not subject.steps or step == subject.steps[-1] else step
    width = point["width"] if subject.has_averages else None
    return GridCell(variant, subject, scale, step, settings, {"prompt": prompt, "seed": seed, **other}, varied, width)


def _hashable(value):
    return tuple(value) if isinstance(value, list | tuple) else value


def _value(value) -> Value:
    """As tables and the page show it."""
    return size_text(value) if isinstance(value, tuple) else value


def _short(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"
