"""Exports the trained weights of a finished run, and compares each written file with the trained model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from sdft.errors import UserError
from sdft.evaluation.export_check import MIN_EFFECT, export_errors, quantization_errors
from sdft.formats.adapter import WordsFile, lora_from_model, words_of, write_words
from sdft.formats.baked import base_metadata
from sdft.formats.diffusers_folder import write_folder
from sdft.formats.lora_file import write_lora_file
from sdft.formats.lora_layer import LoraFile, network_metadata, with_one_alpha
from sdft.formats.metadata import lora_metadata, model_metadata
from sdft.formats.model_checkpoint import open_checkpoint
from sdft.formats.output import atomic_output
from sdft.formats.single_file import write_single_file
from sdft.protocols import DiffusionModel
from sdft.types import DTYPES, Positive

EMBEDDINGS = "embeddings"


class Export:
    """Writes the weights of a finished run. Raises UserError for a file that does not reproduce the trained model.

    `model/`, `model.safetensors`, `lora.safetensors` and the `lora_kohya.safetensors` of a LoRA are read back by
    diffusers. diffusers cannot read LoHa, LoKr, OFT, BOFT, trained norms and biases, of which there is no
    `lora.safetensors`, and drops the magnitudes of a DoRA with kohya's names: those `lora_kohya.safetensors`, and
    `words.safetensors` in every case, are read back by sdft's own reader, which tests compare with the published
    formulas.

    dtype: of a whole model's weights; LoRA files are fp16.
    single_file: also write a whole model as one file, for ComfyUI, A1111 and kohya.
    tolerance: largest deviation of a file's predictions from the trained model's, relative to what training changed;
        if None, 0.02 plus the rounding of a whole model to `dtype`: 0.04 in fp16 and 0.3 in bf16.
    """

    def __init__(
        self,
        dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
        single_file: bool = False,
        tolerance: Positive | None = None,
    ):
        self.dtype, self.single_file = DTYPES[dtype], single_file
        # Rounding the whole of nano moves its prediction by 0.2 to 0.9 eps, relative; twice that is allowed.
        rounding = 2 * torch.finfo(self.dtype).eps / MIN_EFFECT
        self.tolerance = tolerance or 0.02 + rounding

    def __call__(
        self, module: L.LightningModule, folder: Path, title: str, size: int
    ) -> tuple[dict[str, Path], dict[str, float]]:
        """(name -> written path, name -> deviation of the file from the trained model, or of the quantised base from
        the original one).

        title, size: of the run and its images, for the metadata.
        """
        written = self.write(module, folder, described(module, title, size))
        if not isinstance(module.model, DiffusionModel):
            return written, {}
        errors = export_errors(module.model, module.tuning.initial, written, tuple(module.tuning.new_words))
        for name, error in errors.items():
            if not error <= self.tolerance:
                raise UserError(
                    f"export: {written[name]} deviates from the trained model by {error:.1%} of what training changed "
                    f"(export.tolerance={self.tolerance:g}); do not use it. The checkpoint of the run is intact"
                )
        found = {f"export_error/{name}": error for name, error in errors.items()}
        quantized = quantization_errors(module.model)
        return written, found | {f"quantization_error/{part}": error for part, error in quantized.items()}

    def write(self, module: L.LightningModule, folder: Path, about: dict[str, Any]) -> dict[str, Path]:
        """Write the files; name -> path. about: for the metadata, as `described` gives it."""
        if module.tuning.trains_adapters:
            return write_adapter(module, folder, about)
        written = {"model": folder / "model"}
        write_folder(module.model, written["model"], self.dtype)
        if self.single_file and isinstance(module.model, DiffusionModel):
            written["single_file"] = folder / "model.safetensors"
            with atomic_output(written["single_file"], overwrite=True) as path:
                checkpoint = open_checkpoint("export", written["model"])
                write_single_file(checkpoint, path, metadata=model_metadata(**about))
        return written


def described(module: Any, title: str, size: int) -> dict[str, Any]:
    """What the metadata of a run's files says of it. title, size: of the run and its images."""
    return {
        "title": title,
        "prediction": module.objective.prediction or "epsilon",
        "size_hw": (size, size),
        "words": tuple(module.tuning.new_words),
    }


def adapter_of(module: Any, about: dict[str, Any]) -> tuple[LoraFile, dict[str, str]]:
    """The trained adapter and the metadata of its file. about: see `described`."""
    lora = lora_from_model(module.model, module.tuning.initial)
    zero_snr = bool(module.objective.zero_terminal_snr)
    metadata = lora_metadata(**about, zero_terminal_snr=zero_snr) | network_metadata(lora)
    return lora, metadata | base_metadata(module.model)


def file_name(word: str) -> str:
    """The name of the file of a new word."""
    return re.sub(r"[^\w.-]", "_", word)


def write_embeddings(words: WordsFile, folder: Path, end: str = ".safetensors") -> None:
    """Write each new word to a file of its own. end: of the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    for word in words.vectors:
        write_words(words.of(word), folder / f"{file_name(word)}{end}")


def write_adapter(module: L.LightningModule, folder: Path, about: dict[str, Any]) -> dict[str, Path]:
    """The adapter in diffusers' naming, if diffusers can represent it, and in kohya's; the embeddings of new words, all
    in one file, and in `embeddings/` one by one, for programs that name a word by its file."""
    (lora, metadata), written = adapter_of(module, about), {}
    if lora.layers and not lora.not_in_diffusers:
        written["lora"] = folder / "lora.safetensors"
        write_lora_file(lora, written["lora"], "diffusers", torch.float16, metadata)
    if lora.layers:
        written["lora_kohya"] = folder / "lora_kohya.safetensors"
        write_lora_file(with_one_alpha(lora), written["lora_kohya"], "kohya", torch.float16, metadata)
    if about["words"]:
        words, written["words"] = words_of(module.model, about["words"]), folder / "words.safetensors"
        write_words(words, written["words"])
        write_embeddings(words, folder / EMBEDDINGS)
    return written
