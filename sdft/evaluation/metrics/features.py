"""What metrics see pictures through: reduced pixels, or a vision model of transformers."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel

from sdft.errors import UserError
from sdft.evaluation.metrics.measure import Pictures
from sdft.types import Count


class Thumbnails:
    """Pixels in [0, 1] of the picture reduced to `side` x `side`: weight-free; sees layout and colour, not texture."""

    def __init__(self, side: Count = 16):
        self.side = side

    def __call__(self, pictures: Pictures) -> Tensor:
        """N x (3 side side); the Euclidean distance over sqrt(width) is the root mean square of pixels."""
        size = (self.side, self.side)
        small = [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BOX)) for p in pictures]
        return torch.from_numpy(np.stack(small)).float().flatten(1) / 255


class Vision:
    """The pooled output of a vision model in transformers' form, such as DINOv2 or a CSD of that form.

    source: folder or hub id of a model in safetensors with its image processor.
    batch_size: pictures at a time.
    """

    def __init__(self, source: str, batch_size: Count = 32):
        self.source, self.batch_size = source, batch_size

    @cached_property
    def _model(self) -> tuple[Any, Any]:
        folder = Path(self.source).expanduser()
        where = folder if folder.is_dir() else self.source
        try:
            processor = AutoImageProcessor.from_pretrained(where, use_fast=False)
            return processor, AutoModel.from_pretrained(where, use_safetensors=True).eval()
        except (OSError, ValueError) as error:
            raise UserError(
                f"no vision model could be loaded from {self.source!r} ({str(error).splitlines()[0]}); give a folder "
                "or a hub id with a model in safetensors and its preprocessor_config.json"
            ) from error

    @torch.no_grad()
    def __call__(self, pictures: Pictures) -> Tensor:
        """N x D."""
        processor, model = self._model
        found = []
        for first in range(0, len(pictures), self.batch_size):
            batch = list(pictures[first : first + self.batch_size])
            pixels = processor(batch, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
            found.append(model(pixel_values=pixels).pooler_output.float())
        return torch.cat(found)
