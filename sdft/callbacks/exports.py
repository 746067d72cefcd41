"""What a finished run leaves: the learned weights in files that other programs open."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from sdft.formats.adapter import write_lora, write_words
from sdft.formats.diffusers_folder import write_folder
from sdft.tuning import Adapter


def export(module: L.LightningModule, folder: Path) -> dict[str, Path]:
    """Write the weights of a finished run; returns what was written, by what it is."""
    if not isinstance(module.tuning, Adapter):
        write_folder(module.model, folder / "model")
        return {"model": folder / "model"}
    written = {"lora": folder / "lora.safetensors"}
    write_lora(module.model, written["lora"])
    if module.tuning.new_words:
        written["words"] = folder / "words.safetensors"
        write_words(module.model, list(module.tuning.new_words), written["words"])
    return written
