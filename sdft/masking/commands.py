"""`python -m sdft.data mask`: a mask beside each image."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from omegaconf import DictConfig
from PIL import Image

from sdft.config.command import build, command
from sdft.data.contact_sheet import ContactSheet
from sdft.data.error_messages import join_problems
from sdft.data.images import plan_crop
from sdft.data.sources import Folder
from sdft.data.sources.folder import sharing_stems
from sdft.data.threads import in_threads
from sdft.errors import UserError
from sdft.progress import tqdm

LEAST, MOST = 0.005, 0.995
"""Shares of an image: smaller and larger masks are named."""


@dataclass
class MaskJob:
    """Options of `mask`. root: the folder of images. out: of the contact sheet. overwrite: also masks that exist."""

    root: str
    out: str
    overwrite: bool


@command("data_mask")
def mask(cfg: DictConfig) -> None:
    """Make masks for the images of a folder that have none, and a contact sheet of them."""
    job = build(cfg.job)
    root = Path(job.root).expanduser()
    source = Folder(str(root), "all", default_caption="")
    sharing = sharing_stems(source.keys)
    wanted = [index for index in range(len(source.keys)) if job.overwrite or source.mask(index) is None]
    print(f"{len(source.keys)} images, {len(wanted)} to mask")
    if not wanted:
        return
    segmenter, sheet = build(cfg.segmenter), ContactSheet()
    odd, unreadable = [], []
    decoded = in_threads(partial(_pixels, source), wanted, ahead=4)
    for index, image in tqdm(decoded, "masking", len(wanted), unit="image"):
        if isinstance(image, UserError):
            unreadable.append(str(image))
            continue
        key, found_HW = source.keys[index], segmenter(image)
        share = float(found_HW.mean()) / 255
        if not LEAST < share < MOST:
            odd.append(f"{key} ({share:.1%} of it)")
        write_mask(mask_file(root / key, shared=key in sharing), found_HW)
        shown = np.where(found_HW[..., None] >= 128, image, image // 4 + 150)
        sheet.add(shown, plan_crop(image.shape[:2], image.shape[:2]), key, f"{share:.0%}")
    if sheet.cells:
        path = Path(job.out) / "masks.png"
        sheet.save(path, f"masks: {len(sheet.cells)} of {len(wanted)} images")
        print(f"masks beside the images; look at {path}, and correct any mask by hand")
    for name, problems in (("unreadable", unreadable), ("nothing or everything was found in", odd)):
        if problems:
            print(f"{name}: {join_problems(problems)}")
    print("next: train with data.masks=true; objective.outside is the weight outside of them")


def mask_file(image: Path, shared: bool) -> Path:
    """Where the mask of an image is written. shared: whether another image has the same name but for its suffix."""
    return image.with_name(f"{image.name if shared else image.stem}.mask.png")


def write_mask(file: Path, mask_HW: np.ndarray) -> None:
    """Write a mask. Raises UserError if that fails."""
    partial_file = file.with_name(f".sdft_{os.getpid()}.partial")
    try:
        Image.fromarray(mask_HW).save(partial_file, "PNG", optimize=True)
        partial_file.replace(file)
    except OSError as error:
        partial_file.unlink(missing_ok=True)
        raise UserError(
            f"{file} cannot be written ({error.strerror}); free some space, or check permissions"
        ) from error


def _pixels(source: Folder, index: int) -> tuple[int, np.ndarray | UserError]:
    try:
        return index, source.stored(index).pixels()
    except UserError as error:
        return index, error
