"""Feature extractors of metrics: thumbnails, or a vision model of transformers."""

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
from sdft.evaluation.clip_judge import Images
from sdft.types import BatchSize, Count


class Thumbnails:
    """Pixels in [0, 1] of the image reduced to `side` x `side`: no weights; layout and colour, no texture."""

    def __init__(self, side: Count = 16):
        self.side = side

    def __call__(self, images: Images) -> Tensor:
        """N x (3 side side); the Euclidean distance over sqrt(width) is the root mean square of pixels."""
        size = (self.side, self.side)
        small = [np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) for image in images]
        return torch.from_numpy(np.stack(small)).float().flatten(1) / 255


class Vision:
    """The pooled output of a vision model of transformers, such as DINOv2, or CSD converted to that format.

    source: folder or hub id of a model in safetensors with its image processor.
    batch_size: images per forward pass.
    """

    def __init__(self, source: str, batch_size: BatchSize = 32):
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
    def __call__(self, images: Images) -> Tensor:
        """N x D."""
        processor, model = self._model
        found = []
        for first in range(0, len(images), self.batch_size):
            batch = list(images[first : first + self.batch_size])
            pixels = processor(batch, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
            found.append(model(pixel_values=pixels).pooler_output.float())
        return torch.cat(found)
