"""Small models as fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_models import tensors_of, write_model
from torch import Tensor

from sdft.formats.model_checkpoint import open_checkpoint
from sdft.formats.single_file import write_single_file


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder: `model("a", seed=0, dtype=torch.float32)`; or with given `tensors`."""

    def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **tensors: Tensor) -> Path:
        return write_model(tmp_path / name, tensors_of(seed, dtype) | tensors)

    return build


@pytest.fixture
def as_file(tmp_path: Path) -> Callable[[Path], Path]:
    """The same model as one file with LDM names."""

    def convert(folder: Path) -> Path:
        path = folder.with_suffix(".safetensors")
        write_single_file(open_checkpoint("in", folder), path)
        return path

    return convert
