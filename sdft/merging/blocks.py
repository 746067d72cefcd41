"""SDXL's blocks: which one a weight belongs to, numbers that differ between them, and a picture of such numbers.

23 blocks of the UNet in the order of its forward pass, then the text encoders and the VAE. Knows names and numbers;
must not know tensors.
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
"""`time` embeds the step and the sizes, `out` ends; the others are LDM's input, middle and output blocks."""
BLOCKS = (*UNET_BLOCKS, "text_encoder", "text_encoder_2", "vae")
REST = "rest"
SELECTORS = (*BLOCKS, *GROUPS, "unet", REST)
"""What a map from blocks to numbers may name: a block, a group of blocks, the whole UNet, or all that is not named."""

PRESETS: Mapping[str, Mapping[str, float]] = {
    "style": {"output_1": 1.0, REST: 0.0},
    "content": {"output_0": 1.0, REST: 0.0},
    "structure": {"input_8": 1.0, REST: 0.0},
}
"""Where SDXL keeps what, as far as is known: B-LoRA (arXiv:2403.14572) found content and style in the first and the
second attention of the first upward level, InstantStyle (2404.02733) the layout in the last one on the way down."""

Number = float | str | Mapping[str, float]
"""One number, a preset, or numbers by the words above."""


@cache
def block_of(weight: str) -> str:
    """The block of a weight, `part/name`."""
    part, _, name = weight.partition("/")
    if part != "unet":
        return part
    single = mapping_for_weight(part, name).single.removeprefix(PREFIXES["unet"])
    found = re.match(r"(input|middle|output)_blocks?\.(\d+)\.", single)
    if found:
        return f"{found[1]}_{found[2]}"
    return "out" if single.startswith("out.") else "time"


def is_by_block(number: object) -> bool:
    """Whether a method's argument differs between blocks."""
    return isinstance(number, Mapping) or (isinstance(number, str) and number in PRESETS)


def number_for_block(number: Number, block: str) -> float:
    """The number of one block: by its own name, else by its group's, `unet`'s, or `rest`'s."""
    if isinstance(number, str):
        number = PRESETS[number]
    if not isinstance(number, Mapping):
        return number
    return next(number[word] for word in selectors_for(block) if word in number)


def refuse_bad_block_map(key: str, number: Number) -> None:
    """Raise UserError, which starts with `key`, for words that are no blocks, and for blocks without a number."""
    if not isinstance(number, Mapping):
        return
    if odd := [word for word in number if word not in SELECTORS]:
        raise UserError(f"{key}: there is no block {odd[0]!r}; blocks are called {', '.join(SELECTORS)}")
    if lacking := [block for block in BLOCKS if not any(word in number for word in selectors_for(block))]:
        raise UserError(f"{key}: says no number for {', '.join(lacking)}; add them, or `rest` for all others")


def selectors_for(block: str) -> Iterator[str]:
    """The words that speak of a block, the narrowest first."""
    yield block
    if block in UNET_BLOCKS:
        yield from (group for group in GROUPS if block.startswith(f"{group}_"))
        yield "unet"
    yield REST


def plot_blocks(numbers: Mapping[str, Number], path: Path) -> None:
    """A picture of numbers by block, one row of bars for each name."""
    width, height, left = 34, 120, 60
    image = Image.new("RGB", (left + width * len(BLOCKS) + 20, (height + 70) * len(numbers)), "white")
    draw = ImageDraw.Draw(image)
    for row, (name, number) in enumerate(numbers.items()):
        values = [number_for_block(number, block) for block in BLOCKS]
        low, high = min(0.0, *values), max(0.0, *values)
        top, scale = row * (height + 70) + 25, height / ((high - low) or 1.0)
        axis = top + high * scale
        draw.text((6, top - 20), name, "black")
        for i, (block, value) in enumerate(zip(BLOCKS, values, strict=True)):
            x, end = left + i * width, top + (high - value) * scale
            draw.rectangle((x + 4, min(axis, end), x + width - 4, max(axis, end)), fill=(70, 110, 180))
            draw.text((x + 4, min(axis, end) - 12), f"{value:.2g}", "black")
            draw.text((x + 4, top + height + 4 + 14 * (i % 2)), block.replace("text_encoder", "te"), "black")
        draw.line((left, axis, left + width * len(BLOCKS), axis), "black")
    image.save(path)
