"""Annotated numbers that constructors share; the config check reads their bounds.

The upper bounds are far above what anybody needs: they turn a slip of the keyboard into a message within a second,
where it would fill the memory or never end.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le

LARGEST = 1e15
Positive = Annotated[float, Gt(0), Le(LARGEST)]
NonNegative = Annotated[float, Ge(0), Le(LARGEST)]
Fraction = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1), Le(10**9)]
Index = Annotated[int, Ge(0), Le(2**63 - 1)]
Seed = Annotated[int, Ge(-(2**63)), Le(2**63 - 1)]
Rank = Annotated[int, Ge(1), Le(4096)]
Side = Annotated[int, Ge(1), Le(16_384)]
"""Of an image, in pixels."""
BatchSize = Annotated[int, Ge(1), Le(65_536)]
NumWorkers = Annotated[int, Ge(0), Le(1024)]
NumThreads = Annotated[int, Ge(1), Le(1024)]
NumScenes = Annotated[int, Ge(1), Le(10**6)]
NumNodes = Annotated[int, Ge(1), Le(100_000)]
SamplerSteps = Annotated[int, Ge(1), Le(1000)]
"""SDXL was trained with 1000 noise levels."""
OffloadedBlocks = Annotated[int, Ge(0), Le(1_000_000)] | Literal["all"]
"""Number of blocks."""
Devices = Annotated[int, Ge(1), Le(1024)] | Literal["auto", -1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes by the names that configs use."""
Precision = Literal["fp32", "bf16", "fp16"]
"""Names of `DTYPES`."""
