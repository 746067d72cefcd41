"""What a finished run leaves: the learned weights in files that other programs open, each read back and compared."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import nn

from sdft.errors import UserError
from sdft.evaluation.export_check import MIN_EFFECT, export_errors
from sdft.formats.adapter import lora_of, write_words
from sdft.formats.checkpoint import open_checkpoint
from sdft.formats.diffusers_folder import write_folder
from sdft.formats.lora_file import write_lora_file
from sdft.formats.lora_layer import network_metadata
from sdft.formats.metadata import lora_metadata, model_metadata
from sdft.formats.single_file import write_single_file
from sdft.formats.stream import appearing
from sdft.models.sdxl import SDXL
from sdft.tuning.adapter import Adapter
from sdft.types import DTYPES, Positive


class Export:
    """Writes the weights of a finished run, and refuses a file that does not give the trained model back.

    dtype: of a whole model's weights; LoRA files are fp16.
    single_file: also write a whole model as one file, for ComfyUI, A1111 and kohya.
    tolerance: how far a file's predictions may be from the trained model's, as a share of what training changed;
        where not said, 0.02 and what rounding a whole model to `dtype` can do: 0.04 in fp16 and 0.3 in bf16.
    """

    def __init__(
        self,
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
        single_file: bool = False,
        tolerance: Positive | None = None,
    ):
        self.dtype, self.single_file = DTYPES[dtype], single_file
        # Rounding a whole nano was seen to move its prediction by 0.2 to 0.9 eps of itself; twice that is let pass.
        rounding = 2 * torch.finfo(self.dtype).eps / MIN_EFFECT
        self.tolerance = tolerance or 0.02 + rounding

    def __call__(
        self, module: L.LightningModule, folder: Path, title: str, size: int, reload: Callable[[], nn.Module]
    ) -> tuple[dict[str, Path], dict[str, float]]:
        """What was written, by what it is, and how far each file is from the trained model.

        title, size: of the run and its pictures, for the metadata. reload: the base model anew.
        """
        words = tuple(getattr(module.tuning, "new_words", ()))
        said = {
            "title": title,
            "prediction": getattr(module.objective, "prediction", "epsilon"),
            "size_hw": (size, size),
            "words": words,
        }
        written = self.write(module, folder, said)
        if not isinstance(module.model, SDXL):
            return written, {}
        device = module.model.device
        module.model.cpu()  # where two models fit, and both sides of the comparison compute alike
        base = partial(module.tuning.base, module.model)
        errors = export_errors(module.model, base, written, reload, words)
        module.model.to(device)
        for name, error in errors.items():
            if not error <= self.tolerance:
                raise UserError(
                    f"export: {written[name]} is {error:.1%} of what training changed away from the trained model "
                    f"(export.tolerance={self.tolerance:g}), so do not use it; the checkpoint of the run is intact"
                )
        return written, {f"export_error/{name}": error for name, error in errors.items()}

    def write(self, module: L.LightningModule, folder: Path, said: dict[str, Any]) -> dict[str, Path]:
        """The files."""
        if isinstance(module.tuning, Adapter):
            return write_adapter(module, folder, said)
        written = {"model": folder / "model"}
        write_folder(module.model, written["model"], self.dtype)
        if self.single_file and isinstance(module.model, SDXL):
            written["single_file"] = folder / "model.safetensors"
            with appearing(written["single_file"], overwrite=True) as path:
                write_single_file(open_checkpoint("export", written["model"]), path, metadata=model_metadata(**said))
        return written


def write_adapter(module: L.LightningModule, folder: Path, said: dict[str, Any]) -> dict[str, Path]:
    """The LoRA as each program wants it, and the new words."""
    lora, written = lora_of(module.model), {}
    metadata = lora_metadata(**said) | network_metadata(lora)
    if getattr(module.objective, "zero_terminal_snr", False):
        metadata["ss_zero_terminal_snr"] = "True"  # as kohya's trainer calls it; without it, pictures come out grey
    if not lora.without_diffusers_form:
        written["lora"] = folder / "lora.safetensors"
        write_lora_file(lora, written["lora"], "diffusers", torch.float16, metadata)
    written["lora_kohya"] = folder / "lora_kohya.safetensors"
    write_lora_file(lora, written["lora_kohya"], "kohya", torch.float16, metadata)
    if said["words"]:
        written["words"] = folder / "words.safetensors"
        write_words(module.model, list(said["words"]), written["words"])
    return written
