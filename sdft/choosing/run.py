"""Measures the checkpoints of a run at several strengths, and writes the recommended weights."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from sdft.board.outputs import CHOICE
from sdft.choosing.decide import Choice, Decision
from sdft.config.command import build
from sdft.config.trust import as_packages
from sdft.errors import UserError
from sdft.evaluation.image_grid import save_grid
from sdft.evaluation.run import RunParts, config_of, find_device, rebuild_parts
from sdft.evaluation.stopping import Limits, Measurement
from sdft.evaluation.subject_loader import trained_weights
from sdft.evaluation.subjects import read_subjects
from sdft.evaluation.watching import FIGURES, Watched
from sdft.formats.adapter import words_of, write_words
from sdft.formats.diffusers_folder import write_folder
from sdft.formats.json_file import write_json
from sdft.formats.lora_file import write_lora_file
from sdft.formats.lora_layer import network_metadata, with_one_alpha
from sdft.formats.lora_stack import stack_loras
from sdft.progress import tqdm
from sdft.training.callbacks.export import EMBEDDINGS, adapter_of, described, write_embeddings
from sdft.tuning.parameters import copy_parameters
from sdft.types import Precision

RECOMMENDED = "recommended"
WORDS = f"{RECOMMENDED}_words.safetensors"
CHOICE_PICTURE = "choice.png"
SHOWN = 6
"""Pictures of each candidate in choice.png."""


@dataclass(frozen=True)
class Chosen:
    """A finished choice. written: the recommended weights, choice.json, and the files with all figures."""

    choice: Choice
    written: list[Path]


def choose(cfg: DictConfig, report: Callable[[str], Any]) -> Chosen:
    """Choose among the checkpoints of the run `cfg.run`. Raises UserError if they cannot be compared."""
    run, trust = Path(cfg.run).expanduser(), as_packages(cfg.trust)
    if not run.is_dir():
        raise UserError(f"run={cfg.run}: there is no such folder")
    config = config_of(run, trust)
    found = candidates_of(run, cfg.steps, cfg.most)
    measures = measures_of(config, cfg)
    parts = rebuild_parts(run, trust)
    strengths = [1.0]
    if parts.tuning.trains_adapters and parts.tuning.parts and list(cfg.strengths) != [1.0]:
        parts.tuning.refuse_strength("strengths")
        strengths = [float(strength) for strength in cfg.strengths]
    parts.model.to(find_device()).eval()
    if cfg.num_training:
        measures.see_training(build(config.data).train_set.source)
    report(f"{len(found)} checkpoints x {len(strengths)} strengths, {measures.num_pictures} pictures each")
    pictures, measured = measure_all(parts, measures, found, strengths)
    decision = Decision(measured[0], measured[1:], Limits(**{k: cfg.limits[k] for k in FIGURES if k in cfg.limits}))
    choice = decision.choice()
    kept = choice.recommended
    recommended = [] if kept is None else write_recommended(run, config, parts, found, kept)
    if kept is None:
        remove_recommended(run)
    written = [*recommended, *write(run, decision, choice, recommended, pictures, measures)]
    for line in report_lines(decision, choice):
        report(line)
    for path in written:
        report(f"  {path}")
    return Chosen(choice, written)


def candidates_of(run: Path, steps: Sequence[int] | None, most: int) -> dict[int, Path]:
    """Step -> checkpoint: those that the run kept, and its last one; `most` of them, spread evenly."""
    (subject,) = read_subjects({"run": str(run)})
    last, found = run / "checkpoints" / "last.ckpt", dict(subject.checkpoints)
    if subject.num_steps and last.is_file():
        found[subject.num_steps] = last
    if not found:
        raise UserError(f"run={run}: kept no checkpoints; train with callbacks=stop_early, or callbacks=progress")
    if steps is not None:
        if unknown := sorted(set(steps) - set(found)):
            raise UserError(f"steps={list(steps)}: no checkpoint of step {unknown[0]}; there are {sorted(found)}")
        return {step: found[step] for step in sorted(steps)}
    known = sorted(found)
    chosen = {round((len(known) - 1) * (n + 1) / most) for n in range(most)} if len(known) > most else range(len(known))
    return {known[i]: found[known[i]] for i in sorted(chosen)}


def measures_of(config: DictConfig, cfg: DictConfig) -> Watched:
    """What is measured, by the config of the run."""
    verdict = config.get("verdict") or {}
    if not config.get("reference"):
        raise UserError(f"run={cfg.run}: has no held-out images (reference), so that its pictures cannot be measured")
    prompts = [prompt if isinstance(prompt, str) else prompt.prompt for prompt in config.prompts]
    return Watched(
        build(config.reference),
        prompts,
        build(config.sampler),
        config.size,
        other_prompts=list(config.other_prompts),
        caption=config.caption,
        word=verdict.get("word"),
        noun=verdict.get("noun"),
        judge=cfg.judge or verdict.get("judge"),
        num_images=cfg.num_images,
        num_others=cfg.num_others,
        num_training=cfg.num_training,
    )


def measure_all(
    parts: RunParts, measures: Watched, found: Mapping[int, Path], strengths: Sequence[float]
) -> tuple[list[tuple[str, np.ndarray]], list[Measurement]]:
    """(label and some pictures, measurement) of the base and of every candidate."""
    model, tuning = parts.model, parts.tuning
    precision: Precision = "bf16" if model.device.type == "cuda" else "fp32"
    with tqdm(total=1 + len(found) * len(strengths), desc="measuring", unit="candidate", leave=False) as bar:
        with tuning.drawing_base(model):
            drawn = measures.draw(model, precision)
        measures.see_base(drawn)
        pictures, measured = [("base", drawn["own"][:SHOWN])], [Measurement.of(0, measures(drawn))]
        bar.update()
        for step, checkpoint in found.items():
            copy_parameters(model, trained_weights(checkpoint))
            for strength in strengths:
                with ExitStack() as stack:
                    if strength != 1:
                        stack.enter_context(tuning.at_strength(model, strength))
                    drawn = measures.draw(model, precision)
                pictures.append((f"{step} x {strength:g}", drawn["own"][:SHOWN]))
                measured.append(Measurement.of(step, measures(drawn), strength))
                bar.update()
    return pictures, measured


def write(
    run: Path,
    decision: Decision,
    choice: Choice,
    recommended: Sequence[Path],
    pictures: Sequence[tuple[str, np.ndarray]],
    measures: Watched,
) -> list[Path]:
    """Write choice.json, a table and a grid of pictures; returns their paths. recommended: the weights, if any."""
    kept = choice.recommended
    content = {
        "recommended": recommended[0].name if recommended else None,
        "step": None if kept is None else kept.step,
        "strength": None if kept is None else kept.strength,
        "certain": choice.certain,
        "reason": choice.reason,
        "candidates": [
            {"step": one.step, "strength": one.strength, "on_front": one in choice.front, **estimates(one)}
            for one in decision.candidates
        ],
    }
    write_json(run / CHOICE, content)
    rows = [{"step": one.step, "strength": one.strength, **one.means} for one in (decision.base, *decision.candidates)]
    with (run / "choice.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[-1]))
        table.writeheader()
        table.writerows(rows)
    prompts = [wanted.prompt for wanted in measures.wanted["own"][:SHOWN]]
    save_grid(run / CHOICE_PICTURE, [images for _, images in pictures], [label for label, _ in pictures], prompts)
    return [run / CHOICE, run / "choice.csv", run / CHOICE_PICTURE]


def estimates(one: Measurement) -> dict[str, Any]:
    """Figure -> value and 95 % interval."""
    found = {}
    for name, value in one.means.items():
        low, high = one.interval(name)
        found[name] = {"value": value, "low": low, "high": high}
    return found


def write_recommended(
    run: Path, config: DictConfig, parts: RunParts, found: Mapping[int, Path], kept: Measurement
) -> list[Path]:
    """Write the recommended weights, and the embeddings of new words in the files of `Export`, beside each other.

    The strength of an adapter is in its alphas, so that it is used at 1.
    """
    weights: dict[str, Tensor] = trained_weights(found[kept.step])
    copy_parameters(parts.model, weights)
    if not parts.tuning.trains_adapters:
        write_folder(parts.model, run / RECOMMENDED, torch.float16)
        return [run / RECOMMENDED]
    about = described(parts, f"{config.name}, step {kept.step} at {kept.strength:g}", int(config.size))
    (trained, metadata), written = adapter_of(parts, about), []
    if trained.layers or trained.vectors:
        lora = with_one_alpha(stack_loras([(trained, kept.strength)], "strengths"))
        written.append(run / f"{RECOMMENDED}.safetensors")
        write_lora_file(lora, written[0], "kohya", torch.float16, metadata | network_metadata(lora))
    if about["words"]:
        words = words_of(parts.model, about["words"])
        written += [run / WORDS, run / f"{RECOMMENDED}_{EMBEDDINGS}"]
        write_words(words, run / WORDS)
        write_embeddings(words, run / f"{RECOMMENDED}_{EMBEDDINGS}")
    return written


def remove_recommended(run: Path) -> None:
    """Remove the weights that an earlier choice wrote, if there was one: they are not recommended any more."""
    if (run / CHOICE).is_file():
        for file in (run / f"{RECOMMENDED}.safetensors", run / WORDS):
            file.unlink(missing_ok=True)
        for folder in (run / RECOMMENDED, run / f"{RECOMMENDED}_{EMBEDDINGS}"):
            shutil.rmtree(folder, ignore_errors=True)


def report_lines(decision: Decision, choice: Choice) -> Iterator[str]:
    """A table of all candidates, and the choice."""
    names = [name for name in FIGURES if name in decision.base.values]
    yield "  ".join(["step", "strength", *(f"{name:>22}" for name in names)])
    for one in decision.candidates:
        cells = []
        for name in names:
            low, high = one.interval(name)
            cells.append(f"{one.means[name]:6.2f} ({low:5.2f} to {high:5.2f})")
        mark = " <" if one is choice.recommended else ""
        yield "  ".join([f"{one.step:4}", f"{one.strength:8g}", *(f"{cell:>22}" for cell in cells)]) + mark
    yield f"keep {choice.reason}"

