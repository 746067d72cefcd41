"""`python -m sdft.data caption | edit | tags`: captions made, corrected, and edited by rule."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from sdft.captioning.caption_files import CaptionFiles, batches
from sdft.captioning.page.write import write_page
from sdft.captioning.wording import tag_table
from sdft.config.command import build, command
from sdft.data.decode import decode
from sdft.data.error_messages import join_problems
from sdft.data.sources.listing import OWN_RECORD
from sdft.data.threads import in_threads
from sdft.errors import UserError
from sdft.progress import tqdm

SHOWN = 5


@command("data_caption")
def caption(cfg: DictConfig) -> None:
    """Make captions for the images of a folder that have none, and write a page to correct them."""
    files, wording = CaptionFiles(cfg.root), build(cfg.wording)
    wanted = files.to_caption(cfg.overwrite)
    kept = len(files.keys) - len(wanted)
    print(f"{len(files.keys)} images, {len(wanted)} to caption" + (f", {kept} captions stay" if kept else ""))
    unreadable, written = [], 0
    started = time.monotonic()
    if wanted:
        captioner = build(cfg.captioner)
        with tqdm(total=len(wanted), desc="captioning", unit="image") as bar:
            decoded = in_threads(partial(_readable, files), batches(wanted, captioner.batch_size), ahead=2)
            for indices, images, problems in decoded:
                unreadable += problems
                texts = [wording(text) for text in captioner(images)] if images else []
                made = {index: text for index, text in zip(indices, texts, strict=True) if text}
                files.write(made, cfg.captioner_name)
                unreadable += [
                    f"{files.keys[index]} (the captioner says nothing)" for index in set(indices) - set(made)
                ]
                written += len(made)
                bar.update(len(images) + len(problems))
        print(f"{written} captions written in {time.monotonic() - started:.0f} s")
    if unreadable:
        print(f"without caption: {join_problems(unreadable)}")
    _page(cfg, files.root)


def _readable(files: CaptionFiles, indices: Sequence[int]) -> tuple[list[int], list[np.ndarray], list[str]]:
    """(indices, images) of those that can be decoded, and a line for each of the others."""
    good, images, problems = [], [], []
    for index in indices:
        try:
            images.append(decode(files.source.stored(index).content()))
            good.append(index)
        except Exception as error:
            problems.append(f"{files.keys[index]} ({error})")
    return good, images, problems


def _page(cfg: DictConfig, root: Path) -> None:
    """Write the page of captions."""
    files = CaptionFiles(root)
    path = Path(cfg.out) / "captions.html"
    num = write_page(path, files, partial(tqdm, desc="page", unit="image", total=len(files.keys), leave=False))
    print(f"next: open {path} ({num} images), and take its corrections: python -m sdft.data edit root={cfg.root} "
          "corrections=FILE")  # fmt: skip


@command("data_edit")
def edit(cfg: DictConfig) -> None:
    """Edit the captions of a folder: corrections of the page, or rules for all captions."""
    files, wording = CaptionFiles(cfg.root), build(cfg.wording)
    if cfg.corrections is not None:
        changes, by = files.corrections(Path(cfg.corrections)), "a person"
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
    if cfg.preview:
        print(f"{len(changes)} captions would change; nothing was written")
        return
    files.write(changes, by)
    print(f"{len(changes)} captions changed; what they were is in {files.root / OWN_RECORD}")


@command("data_tags")
def tags(cfg: DictConfig) -> None:
    """Print the tags of a folder's captions, the most frequent first."""
    files = CaptionFiles(cfg.root)
    captions = [files[index] for index in range(len(files.keys)) if files[index]]
    table = tag_table(captions)
    width = len(str(len(captions)))
    for tag, count in table[: cfg.most]:
        print(f"{count:>{width}}  {count / len(captions):4.0%}  {tag}")
    print(f"{len(table)} tags in {len(captions)} captions" + (f", {cfg.most} shown" if len(table) > cfg.most else ""))
