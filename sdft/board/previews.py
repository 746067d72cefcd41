"""The pictures of a run: previews over the steps beside the base model's, and before_after.png."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from sdft.formats.json_file import json_if_readable
from sdft.pages import html

FOLDER, PROMPTS, BASE = "previews", "prompts.json", "base"
STEP = re.compile(r"step_(\d+)(?:\.png)?")
MOST_STEPS = 24
PIXELS, LONGEST, OF_A_GRID, OF_BEFORE_AFTER = 5_400_000, 256, 640, 1200
"""Of all previews together, and of the sides of one, of a grid of several, and of before_after.png."""
MOST_BYTES = 2_200_000
"""Of the previews on a page; beyond it, fewer steps are shown."""

Picture = dict[str, Any]


def previews_of(run_dir: Path) -> dict[str, Any] | None:
    """The previews of a run, as the page shows them; None if it has none.

    `steps`: [{"step", "pictures"}]; `base`: the base model's pictures, in the order of `prompts`; a picture is null
    where its file is missing. A folder with grids alone has one picture a step, and no `base`.
    """
    folder = run_dir / FOLDER
    singles = numbered(path for path in folder.glob("step_*") if path.is_dir())
    if not singles:
        grids = numbered(folder.glob("step_*.png"))
        shown = evenly(grids, MOST_STEPS)
        found = [{"step": step, "pictures": [picture(run_dir, path, OF_A_GRID)]} for step, path in shown]
        return {"prompts": [], "base": [], "steps": fitting(found), "grids": True} if found else None
    prompts = read_prompts(folder / PROMPTS)
    names = sorted({path.name for _, step in singles for path in step.glob("*.png")})
    side = max(64, min(LONGEST, math.isqrt(PIXELS // (len(names) * (MOST_STEPS + 1) or 1))))
    told = [prompts[int(Path(name).stem)] if Path(name).stem.isdigit() and int(Path(name).stem) < len(prompts) else {}
            for name in names]  # fmt: skip
    return {
        "prompts": told,
        "base": [picture(run_dir, folder / BASE / name, side) for name in names],
        "steps": fitting([
            {"step": step, "pictures": [picture(run_dir, path / name, side) for name in names]}
            for step, path in evenly(singles, MOST_STEPS)
        ]),
        "grids": False,
    }  # fmt: skip


def numbered(paths: Any) -> list[tuple[int, Path]]:
    """(step, path) of files or folders that are named by a step, in its order."""
    found = [(int(match[1]), path) for path in paths if (match := STEP.fullmatch(path.name))]
    return sorted(found)


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, among them the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def fitting(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many of the steps as have room on a page."""
    while len(steps) > 2 and sum(len(p["uri"]) for step in steps for p in step["pictures"] if p) > MOST_BYTES:
        steps = evenly(steps, len(steps) * 3 // 4)
    return steps


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """What prompts.json says of each picture: prompt, negative prompt, seed, size; empty if it cannot be read."""
    found = json_if_readable(file)
    return [item if isinstance(item, dict) else {} for item in found] if isinstance(found, list) else []


def picture(run_dir: Path, path: Path, side: int) -> Picture | None:
    """A thumbnail, with the path of its file in the run folder; None for a file that is missing or half written."""
    try:
        stat = path.stat()
        small = _thumbnail(path, side, stat.st_mtime_ns, stat.st_size)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    return {**small, "file": path.relative_to(run_dir).as_posix()}


@functools.lru_cache(maxsize=2048)
def _thumbnail(path: Path, side: int, changed: int, size: int) -> Picture:
    """The page of a run that goes on is written again and again; its old pictures stay the same."""
    with Image.open(path) as opened:
        return html.thumbnail(opened, side)
