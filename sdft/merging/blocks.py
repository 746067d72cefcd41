"""SDXL's blocks: which block a weight belongs to, numbers that differ between blocks, and a bar chart of such numbers.

23 blocks of the UNet in the order of its forward pass, then the text encoders and the VAE. Works on names and numbers;
must not depend on tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw

from sdft.errors import UserError
from sdft.formats.keys import PREFIXES, mapping_for_weight

GROUPS = {"input": 9, "middle": 3, "output": 9}
UNET_BLOCKS = (
    "time",
    *(f"{group}_{i}" for group, count in GROUPS.items() for i in range(count)),
    "out",
)
"""`time` has the timestep and size embeddings, `out` the last layers; the others are LDM's input, middle and output
blocks."""
BLOCKS = (*UNET_BLOCKS, "text_encoder", "text_encoder_2", "vae")
REST = "rest"
SELECTORS = (*BLOCKS, *GROUPS, "unet", REST)
"""The keys of a map from blocks to numbers: a block, a group of blocks, `unet`, or `rest` for all other blocks."""

PRESETS: Mapping[str, Mapping[str, float]] = {
    "style": {"output_1": 1.0, REST: 0.0},
    "content": {"output_0": 1.0, REST: 0.0},
    "structure": {"input_8": 1.0, REST: 0.0},
}
"""B-LoRA (arXiv:2403.14572) found content and style in the first and the second attention of the first up block,
InstantStyle (arXiv:2404.02733) the layout in the last attention of the down blocks."""

Number = float | str | Mapping[str, float]
"""One number, the name of a preset, or a map from `SELECTORS` to numbers."""


@cache
def block_of(weight: str) -> str:
    """The block of the weight `part/name`."""
    part, _, name = weight.partition("/")
    if part != "unet":
        return part
    single = mapping_for_weight(part, name).single.removeprefix(PREFIXES["unet"])
    found = re.match(r"(input|middle|output)_blocks?\.(\d+)\.", single)
    if found:
        return f"{found[1]}_{found[2]}"
    return "out" if single.startswith("out.") else "time"


def is_by_block(number: object) -> bool:
    """Whether a number is given by block."""
    return isinstance(number, Mapping) or (isinstance(number, str) and number in PRESETS)


def number_for_block(number: Number, block: str) -> float:
    """The number for one block: by its name, else by its group, else by `unet`, else by `rest`."""
    if isinstance(number, str):
        number = PRESETS[number]
    if not isinstance(number, Mapping):
        return number
    return next(number[selector] for selector in selectors_for(block) if selector in number)


def refuse_bad_block_map(key: str, number: Number) -> None:
    """Raise UserError, which starts with `key`, for unknown blocks in a map, and for blocks without a number."""
    if not isinstance(number, Mapping):
        return
    if unknown := [selector for selector in number if selector not in SELECTORS]:
        raise UserError(f"{key}: there is no block {unknown[0]!r}; blocks are called {', '.join(SELECTORS)}")
    if missing := [block for block in BLOCKS if not any(selector in number for selector in selectors_for(block))]:
        raise UserError(f"{key}: has no number for {', '.join(missing)}; add them, or `rest` for all others")


def selectors_for(block: str) -> Iterator[str]:
    """The keys of a map that cover a block, the most specific first."""
    yield block
    if block in UNET_BLOCKS:
        yield from (group for group in GROUPS if block.startswith(f"{group}_"))
        yield "unet"
    yield REST


def plot_blocks(numbers: Mapping[str, Number], path: Path) -> None:
    """Save a bar chart of numbers by block, one row for each name."""
    width, height, margin = 34, 120, 60
    image = Image.new("RGB", (margin + width * len(BLOCKS) + 20, (height + 70) * len(numbers)), "white")
    draw = ImageDraw.Draw(image)
    for row, (name, number) in enumerate(numbers.items()):
        values = [number_for_block(number, block) for block in BLOCKS]
        low, high = min(0.0, *values), max(0.0, *values)
        top, scale = row * (height + 70) + 25, height / ((high - low) or 1.0)
        axis = top + high * scale
        draw.text((6, top - 20), name, "black")
        for i, (block, value) in enumerate(zip(BLOCKS, values, strict=True)):
            x, end = margin + i * width, top + (high - value) * scale
            draw.rectangle((x + 4, min(axis, end), x + width - 4, max(axis, end)), fill=(70, 110, 180))
            draw.text((x + 4, min(axis, end) - 12), f"{value:.2g}", "black")
            draw.text((x + 4, top + height + 4 + 14 * (i % 2)), block.replace("text_encoder", "te"), "black")
        draw.line((margin, axis, margin + width * len(BLOCKS), axis), "black")
    image.save(path)
