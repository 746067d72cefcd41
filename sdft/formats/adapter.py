"""LoRA files that diffusers' `load_lora_weights` takes, and learned words as textual-inversion files.

Knows key names, metadata and where the tensors sit in a model with peft adapters.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdft.types import UserError

PARTS = ("unet", "text_encoder", "text_encoder_2")


def write_lora(model: nn.Module, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Save the adapters of every part, with their alphas in the metadata; the file appears whole or not at all."""
    layers, metadata = {}, {}
    for part in PARTS:
        module = model.get_submodule(part)
        if not getattr(module, "peft_config", None):
            continue
        tensors = get_peft_model_state_dict(module, adapter_name="default")
        layers[f"{part}_lora_layers"] = {name: to_file(tensor, dtype) for name, tensor in tensors.items()}
        metadata[f"{part}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".saving-") as folder:
        StableDiffusionXLPipeline.save_lora_weights(folder, weight_name=path.name, **layers, **metadata)
        (Path(folder) / path.name).replace(path)


def write_words(model: nn.Module, words: list[str], path: Path) -> None:
    """Save the learned rows of new words as `clip_l` and `clip_g`, the textual-inversion format of SDXL."""
    tensors = {name: to_file(rows, torch.float32) for name, rows in model.word_rows.items()}
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata={"words": "\n".join(words)})
    partial.replace(path)


def to_file(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as it is stored."""
    return tensor.detach().to("cpu", dtype).contiguous()


def read_header(key: str, path: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors in a file, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys()), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{key}: cannot be read ({error})") from error


def read_words(path: Path, key: str = "words") -> tuple[list[str], dict[str, Tensor]]:
    """Learned words and their rows, `clip_l` and `clip_g`, each N x D."""
    names, metadata = read_header(key, path)
    words = metadata.get("words", "").split("\n")
    if set(names) != {"clip_l", "clip_g"} or not all(words) or len(set(words)) < len(words):
        raise UserError(f"{key}: {path.name} holds no learned words (clip_l, clip_g and the list of words)")
    with safe_open(path, framework="pt") as file:
        return words, {name: file.get_tensor(name) for name in names}
