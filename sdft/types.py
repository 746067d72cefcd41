"""Annotated numbers that constructors share; the config check reads their bounds."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Count = Annotated[int, Ge(1)]
Index = Annotated[int, Ge(0)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Dtypes by the names that configs use."""
Precision = Literal["fp32", "bf16", "fp16"]
"""Names of `DTYPES`."""
