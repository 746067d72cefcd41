"""`python -m sdft.data caption | edit | tags`: captions made, corrected, and edited by rule."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from sdft.captioning.caption_files import CaptionFiles, Overwrite
from sdft.captioning.page.write import write_page
from sdft.captioning.wording import tag_table
from sdft.config.command import build, command
from sdft.data.decode import UnreadableImage, decode
from sdft.data.error_messages import join_problems
from sdft.data.order import chunks
from sdft.data.sources.listing import OWN_RECORD
from sdft.data.threads import in_threads
from sdft.errors import UserError
from sdft.progress import tqdm
from sdft.types import Count

SHOWN = 5


@dataclass
class CaptionJob:
    """Options of `caption`. root: the folder of images. out: of the page. overwrite: which captions are made again.
    by: the name of the captioner."""

    root: str
    out: str
    overwrite: Overwrite
    by: str


@dataclass
class EditJob:
    """Options of `edit`. corrections: a file that the page has exported. preview: shows changes and writes nothing."""

    root: str
    corrections: str | None
    preview: bool


@dataclass
class TagsJob:
    """Options of `tags`. most: tags that are printed."""

    root: str
    most: Count


@command("data_caption")
def caption(cfg: DictConfig) -> None:
    """Make captions for the images of a folder that have none, and write a page to correct them."""
    job, wording = build(cfg.job), build(cfg.wording)
    files = CaptionFiles(job.root)
    wanted = files.to_caption(job.overwrite)
    kept = len(files.keys) - len(wanted)
    print(f"{len(files.keys)} images, {len(wanted)} to caption" + (f", {kept} captions stay" if kept else ""))
    unreadable, written, meanwhile = [], 0, []
    started = time.monotonic()
    if wanted:
        captioner = build(cfg.captioner)
        with tqdm(total=len(wanted), desc="captioning", unit="image") as bar:
            decoded = in_threads(partial(_readable, files), chunks(wanted, captioner.batch_size), ahead=2)
            for indices, images, problems in decoded:
                unreadable += problems
                texts = [wording(text) for text in captioner(images)] if images else []
                made = {index: text for index, text in zip(indices, texts, strict=True) if text}
                meanwhile += (skipped := files.write(made, job.by))
                unreadable += [
                    f"{files.keys[index]} (the captioner says nothing)" for index in set(indices) - set(made)
                ]
                written += len(made) - len(skipped)
                bar.update(len(images) + len(problems))
        print(f"{written} captions written in {time.monotonic() - started:.0f} s")
    if meanwhile:
        print(f"written by somebody meanwhile, and kept: {join_problems(meanwhile)}")
    if unreadable:
        print(f"without caption: {join_problems(unreadable)}")
    _page(job)


def _readable(files: CaptionFiles, indices: Sequence[int]) -> tuple[list[int], list[np.ndarray], list[str]]:
    """(indices, images) of those that can be decoded, and a line for each of the others."""
    good, images, problems = [], [], []
    for index in indices:
        try:
            images.append(decode(files.source.stored(index).content()))
            good.append(index)
        except UnreadableImage as error:
            problems.append(f"{files.keys[index]} ({error})")
    return good, images, problems


def _page(job: CaptionJob) -> None:
    """Write the page of captions."""
    files = CaptionFiles(job.root)
    path = Path(job.out) / "captions.html"
    num = write_page(path, files, partial(tqdm, desc="page", unit="image", total=len(files.keys), leave=False))
    print(f"next: open {path} ({num} images), and take its corrections: python -m sdft.data edit root={job.root} "
          "corrections=FILE")  # fmt: skip


@command("data_edit")
def edit(cfg: DictConfig) -> None:
    """Edit the captions of a folder: corrections of the page, or rules for all captions."""
    job, wording = build(cfg.job), build(cfg.wording)
    files = CaptionFiles(job.root)
    if job.corrections is not None:
        if wording.changes:
            raise UserError("corrections=FILE is taken as it is: leave out wording.*, or edit by rule afterwards")
        changes, by = files.corrections(Path(job.corrections)), "a person"
    else:
        indices = [index for index in range(len(files.keys)) if files[index] and not files.several(index)]
        wording.counted([files[index] for index in indices])
        edited = {index: wording(files[index]) for index in indices}
        changes, by = {index: text for index, text in edited.items() if text != files[index]}, "a rule"
        if empty := [files.keys[index] for index, text in changes.items() if not text]:
            raise UserError(f"wording: nothing would be left of the captions of {join_problems(empty)}")
    for index, text in list(changes.items())[:SHOWN]:
        print(f"{files.keys[index]}\n  - {files[index]}\n  + {text}")
    if len(changes) > SHOWN:
        print(f"and {len(changes) - SHOWN} more")
    if job.preview:
        print(f"{len(changes)} captions would change; nothing was written")
        return
    if skipped := files.write(changes, by):
        print(f"changed by somebody meanwhile, and kept: {join_problems(skipped)}")
    print(f"{len(changes) - len(skipped)} captions changed; what they were is in {files.root / OWN_RECORD}")


@command("data_tags")
def tags(cfg: DictConfig) -> None:
    """Print the tags of a folder's captions, the most frequent first."""
    job = build(cfg.job)
    files = CaptionFiles(job.root)
    captions = [files[index] for index in range(len(files.keys)) if files[index]]
    table = tag_table(captions)
    width = len(str(len(captions)))
    for tag, count in table[: job.most]:
        print(f"{count:>{width}}  {count / len(captions):4.0%}  {tag}")
    print(f"{len(table)} tags in {len(captions)} captions" + (f", {job.most} shown" if len(table) > job.most else ""))
