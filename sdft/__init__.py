"""Teach Stable Diffusion XL a style or a new word, blend the results, and show honestly what changed."""

import os

# transformers tells at import that torchvision is absent; nothing here needs it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
__version__ = "0.1.0"
