"""Teach Stable Diffusion XL a style or a new word, blend the results, and show honestly what changed.

The Python API is `compose`, `finetune`, `load_model`, `sample`, `merge` and `compare` (docs/python_api.md).
"""

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdft.api import compare, compose, finetune, load_model, merge, sample
    from sdft.errors import UserError

__all__ = ["UserError", "compare", "compose", "finetune", "load_model", "merge", "sample"]
__version__ = "0.1.0"

# transformers reports at import that torchvision is absent; nothing here needs it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# bitsandbytes, which peft imports, asks on CPUs with AVX-512 BF16 for a kernel of the hub that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    # Loaded at first use, so that `import sdft` does not import torch.
    if name not in __all__:
        raise AttributeError(f"module 'sdft' has no attribute '{name}'")
    return getattr(importlib.import_module("sdft.errors" if name == "UserError" else "sdft.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
