"""What is drawn: subjects times every axis, as a list of cells.

Knows names and numbers. Must not know models, files or how pictures are judged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import MinLen

from sdft.errors import UserError
from sdft.evaluation.results import Value
from sdft.evaluation.subjects import FINAL, Subject
from sdft.sampling.samplers import Sampler
from sdft.types import Count, Fraction, Index, NonNegative

Axis = Literal["sampler", "cfg", "steps", "rescale", "negative", "size", "scale", "step"]
Size = Count | Annotated[Sequence[Count], MinLen(2)]
"""Side of a square in pixels, or [height, width]."""


class Axes:
    """What is varied, each a list of values; what is not said is as `sampler` and `size` say.

    sampler: solvers by name.
    cfg, steps, rescale, negative: of the sampler.
    size: sides in pixels, or [height, width].
    scale: strengths of a subject's LoRAs, times their own; what has none is the same at all of them.
    step: of training, where a run kept checkpoints (`callbacks=progress`), or `all`; the last is the run's result.
    """

    def __init__(
        self,
        sampler: Sequence[str] | None = None,
        cfg: Sequence[NonNegative] | None = None,
        steps: Sequence[Count] | None = None,
        rescale: Sequence[Fraction] | None = None,
        negative: Sequence[str] | None = None,
        size: Sequence[Size] | None = None,
        scale: Sequence[float] | None = None,
        step: Sequence[Index] | Literal["all"] | None = None,
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
            }.items()
            if values is not None
        }
        for name, values in self.values.items():
            if not values:
                raise UserError(f"axes.{name} is empty: give at least one value, or null")


@dataclass(frozen=True)
class Setting:
    """Everything a picture is made with, besides the weights."""

    prompt: str
    seed: int
    sampler: str
    steps: int
    cfg: float
    rescale: float
    negative: str
    size_hw: tuple[int, int]

    def drawn_by(self, batch_size: int) -> Sampler:
        """The sampler that draws it."""
        return Sampler(self.sampler, self.steps, self.cfg, self.negative, self.rescale, batch_size)


@dataclass(frozen=True)
class Cell:
    """One picture to be drawn.

    contestant: the subject as it is known in the results: with the values of the axes that compete.
    axes: where it stands among the contestant's pictures; two pictures with the same axes make a pair.
    scale: of the subject's LoRAs. step: of training, FINAL for the finished weights.
    """

    contestant: str
    subject: Subject
    scale: float
    step: int
    setting: Setting
    axes: Mapping[str, Value]
    varied: Mapping[str, Value]

    @property
    def pair(self) -> tuple:
        """What it shares with its partners of other contestants."""
        return tuple(self.axes.items())


def cells(
    subjects: Sequence[Subject],
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: Sampler,
    size: Size,
    axes: Axes,
    compete: Sequence[Axis] = (),
) -> list[Cell]:
    """The grid, subject by subject, and within one from the slowest axis to prompts and seeds."""
    default = {**options_of(sampler), "size": _hashable(size), "scale": 1.0}
    steps = training_steps(subjects, axes.step)
    values = {name: axes.values.get(name, [value]) for name, value in default.items()} | {"step": steps}
    for name in compete:
        if len(values[name]) < 2:
            raise UserError(f"compete={list(compete)}: axes.{name} has fewer than two values; give some")
    shown = [name for name in values if len(values[name]) > 1]
    found = []
    for subject in subjects:
        for point in _points(subject, values, compete):
            told = {name: _value(point[name]) for name in shown if point[name] is not None}
            varied = {name: value for name, value in told.items() if name in compete}
            other = {name: value for name, value in told.items() if name not in compete}
            contestant = " ".join([subject.name, *(f"{name} {_short(value)}" for name, value in varied.items())])
            for prompt, seed in itertools.product(prompts, seeds):
                found.append(_cell(contestant, subject, point, prompt, seed, other, varied))
    return found


def options_of(sampler: Sampler) -> dict[str, Value]:
    """What a sampler is, by the names of the axes."""
    return {
        "sampler": sampler.name,
        "cfg": sampler.cfg,
        "steps": sampler.steps,
        "rescale": sampler.rescale,
        "negative": sampler.negative,
    }


def size_in_words(size: Size) -> str:
    """Width x height."""
    h, w = (size, size) if isinstance(size, int) else size
    return f"{w}x{h}"


def training_steps(subjects: Sequence[Subject], asked: Sequence[int] | Literal["all"] | None) -> list[int]:
    """The steps of training that are looked at; FINAL alone where nothing is asked."""
    if asked is None:
        return [FINAL]
    known = sorted({step for subject in subjects for step in subject.steps})
    if not known:
        raise UserError("axes.step: none of the subjects is a run with checkpoints; train with callbacks=progress")
    if asked == "all":
        return known
    for step in asked:
        if step not in known:
            raise UserError(f"axes.step={step}: no subject has a checkpoint of that step; there are {known}")
    return list(asked)


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
    """Every combination of the axes; a subject does not compete with itself on an axis that it does not have."""
    own = dict(values)
    if "scale" in compete and not subject.loras:
        own["scale"] = [None]
    if subject.steps:
        own["step"] = [step for step in values["step"] if step == FINAL or step in subject.steps]
    elif "step" in compete:
        own["step"] = [None]
    for point in itertools.product(*own.values()):
        yield dict(zip(own, point, strict=True))


def _cell(
    contestant: str, subject: Subject, point: Mapping, prompt: str, seed: int, other: Mapping, varied: Mapping
) -> Cell:
    size, step = point["size"], point["step"]
    setting = Setting(
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
    # A run's last step is what it exported.
    step = FINAL if step is None or not subject.steps or step == subject.steps[-1] else step
    return Cell(contestant, subject, scale, step, setting, {"prompt": prompt, "seed": seed, **other}, varied)


def _hashable(value):
    return tuple(value) if isinstance(value, list | tuple) else value


def _value(value) -> Value:
    """As tables and pages show it."""
    return size_in_words(value) if isinstance(value, tuple) else value


def _short(value: Value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"
