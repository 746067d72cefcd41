"""Tags by a tagger of the WD family (SmilingWolf's on the hub), through onnxruntime."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sdft.errors import UserError
from sdft.types import BatchSize, Fraction

FILES = ("model.onnx", "selected_tags.csv")
RATING, GENERAL, CHARACTER = 9, 0, 4
"""Categories in `selected_tags.csv`."""
FACES = {"0_0", "(o)_(o)", "+_+", "+_-", "._.", "<o>_<o>", "<|>_<|>", "=_=", ">_<", "3_3", "6_9", ">_o", "@_@", "^_^",
         "o_o", "u_u", "x_x", "|_|", "||_||"}  # fmt: skip
"""Tags whose underscore is no space."""


class WDTagger:
    """Tags whose probability is above a threshold, the most likely first, characters before the rest.

    model: folder, or hub id. threshold, character_threshold: of general and of character tags. underscores: keeps
    `red_hair` instead of `red hair`.

    Images are put on a white square, resized (bicubic), and given as BGR in 0 to 255, as the models were trained.
    Raises UserError without onnxruntime, and if the model cannot be loaded.
    """

    def __init__(
        self,
        model: str = "SmilingWolf/wd-vit-tagger-v3",
        threshold: Fraction = 0.35,
        character_threshold: Fraction = 0.85,
        underscores: bool = False,
        batch_size: BatchSize = 8,
    ):
        try:
            import onnxruntime
        except ImportError:
            raise UserError(
                "captioner=wd_tagger needs onnxruntime, which is not installed: pip install 'sdft[tagger]'"
            ) from None
        onnx, table = files_of(model)
        self.batch_size = batch_size
        try:
            self.session = onnxruntime.InferenceSession(onnx, providers=onnxruntime.get_available_providers())
        except Exception as error:  # onnxruntime has its own kinds for damaged and unknown models
            raise UserError(f"captioner.model={model}: {onnx.name} cannot be loaded ({error})") from error
        self.input = self.session.get_inputs()[0]
        self.tags, categories = read_tags(table)
        limits = {GENERAL: threshold, CHARACTER: character_threshold}
        self.limits_T = np.array([limits.get(category, np.inf) for category in categories])
        self.first_T = np.array([category != CHARACTER for category in categories])
        if not underscores:
            self.tags = [tag if tag in FACES else tag.replace("_", " ") for tag in self.tags]

    def __call__(self, images: Sequence[np.ndarray]) -> list[str]:
        side = self.input.shape[1]
        pixels_BHWC = np.stack([squared(image, side) for image in images])
        (found_BT,) = self.session.run(None, {self.input.name: pixels_BHWC})
        if found_BT.shape[1] != len(self.tags):
            raise UserError(f"captioner.model: has {found_BT.shape[1]} outputs and a table of {len(self.tags)} tags")
        captions = []
        for found_T in found_BT:
            chosen = np.flatnonzero(found_T > self.limits_T)
            order = np.lexsort((-found_T[chosen], self.first_T[chosen]))
            captions.append(", ".join(self.tags[place] for place in chosen[order]))
        return captions


def files_of(model: str) -> tuple[Path, Path]:
    """The model and its table of tags, in a folder or of the hub."""
    folder = Path(model).expanduser()
    try:
        if folder.is_dir():
            onnx, table = (folder / name for name in FILES)
            if missing := [name for name in FILES if not (folder / name).is_file()]:
                raise UserError(f"captioner.model={model}: the folder lacks {' and '.join(missing)}")
            return onnx, table
        from huggingface_hub import hf_hub_download

        onnx, table = (Path(hf_hub_download(model, name)) for name in FILES)
        return onnx, table
    except (OSError, ValueError) as error:
        raise UserError(
            f"captioner.model={model}: cannot be loaded ({' '.join(str(error).split())}); give a folder with "
            f"{' and '.join(FILES)}, or a hub id"
        ) from error


def read_tags(table: Path) -> tuple[list[str], list[int]]:
    """Names and categories of the outputs."""
    try:
        with table.open(encoding="utf-8", newline="") as opened:
            rows = [(row["name"], int(row["category"])) for row in csv.DictReader(opened)]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"captioner.model: {table} is no table of tags with the columns name and category") from error
    return [name for name, _ in rows], [category for _, category in rows]


def squared(image_HWC: np.ndarray, side: int) -> np.ndarray:
    """The image in the middle of a white square, as fp32 BGR in 0 to 255."""
    h, w = image_HWC.shape[:2]
    longest = max(h, w)
    square = np.full((longest, longest, 3), 255, np.uint8)
    top, left = (longest - h) // 2, (longest - w) // 2
    square[top : top + h, left : left + w] = image_HWC
    resized = Image.fromarray(square).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(resized, np.float32)[:, :, ::-1]
