"""Writes the adapter as a LoRA file during the run, for ComfyUI, A1111, Forge and kohya's scripts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import lightning as L
import torch
from annotated_types import Ge
from torch import Tensor

from sdft.distributed.sharding import gather_weights
from sdft.errors import UserError
from sdft.formats.adapter import words_of
from sdft.formats.lora_file import write_lora_file
from sdft.formats.lora_layer import with_one_alpha
from sdft.protocols import Tuning, strategy_hooks
from sdft.training.callbacks.averaged import averaged_weights
from sdft.training.callbacks.export import EMBEDDINGS, adapter_of, described, file_name, write_embeddings
from sdft.tuning.parameters import exchanged, trainable_parameters
from sdft.types import Count, Side

FOLDER = "loras"


class LoraFiles(L.Callback):
    """Writes `NAME-step00000200.safetensors` to `loras/` in the run folder, and new words to `embeddings/` there.

    Each file is what the run would export at that step: of the averaged weights if there is an average, in fp16, with
    the same metadata and the step (`ss_steps`). It is written whole or not at all. Files of later steps, of a run that
    this one goes on from or replaces, stay until it reaches their steps.

    run_dir: the run folder. name, size: of the run and its images, for names and metadata.
    every: optimizer steps between two files; None writes none.
    keep: number of files to keep, the last ones; 0 keeps all.
    keep_every: files of steps that are multiples of this are always kept.

    Raises UserError with full fine-tuning, which makes whole models.
    """

    def __init__(
        self,
        run_dir: str,
        name: str,
        size: Side,
        every: Count | None = None,
        keep: Annotated[int, Ge(0)] = 0,
        keep_every: Count | None = None,
    ):
        self.folder, self.name, self.size = Path(run_dir) / FOLDER, name, size
        self.every, self.keep, self.keep_every = every, keep, keep_every
        self._last = 0

    def check_tuning(self, tuning: Tuning) -> None:
        if self.every is not None and not tuning.trains_adapters:
            raise UserError(
                f"callbacks.lora_files.every={self.every}: full fine-tuning makes whole models, not LoRAs; set it to "
                "null, and keep checkpoints with callbacks=progress (Lightning's ModelCheckpoint)"
            )

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._last = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if self.every is None or step == self._last or step % self.every:
            return
        self._last = step
        is_sharded = strategy_hooks(trainer.strategy).num_shards(trainer.world_size) > 1
        if not trainer.is_global_zero and not is_sharded:
            return
        with averaged_weights(trainer, module):
            weights = dict(trainable_parameters(module.model))
            whole = gather_weights(weights) if is_sharded else weights
            if trainer.is_global_zero and all(weight.isfinite().all() for weight in whole.values()):
                self._write(module, whole, step)
                self._remove_old(step, module.tuning.new_words)

    def _write(self, module: Any, weights: Mapping[str, Tensor], step: int) -> None:
        about = described(module, self.name, self.size)
        with exchanged(module.model, weights):
            lora, metadata = adapter_of(module, about)
            if lora.layers or lora.vectors:
                path = self.folder / f"{self.name}{suffix(step)}"
                write_lora_file(with_one_alpha(lora), path, "kohya", torch.float16, metadata | {"ss_steps": str(step)})
            if about["words"]:
                write_embeddings(words_of(module.model, about["words"]), self.folder / EMBEDDINGS, suffix(step))

    def _remove_old(self, step: int, words: Iterable[str]) -> None:
        """Remove the files of earlier steps that are not to be kept."""
        starts = [self.folder / self.name, *(self.folder / EMBEDDINGS / file_name(word) for word in words)]
        for start in starts if self.keep else ():
            by_step: dict[int, Path] = {}
            for file in start.parent.glob("*.safetensors"):
                match = re.fullmatch(rf"{re.escape(start.name)}-step(\d{{8,}})\.safetensors", file.name)
                if match and int(match[1]) <= step:
                    by_step[int(match[1])] = file
            for old in sorted(by_step)[: -self.keep]:
                if self.keep_every is None or old % self.keep_every:
                    by_step[old].unlink(missing_ok=True)


def suffix(step: int) -> str:
    """The end of the name of a file of a step, as kohya's scripts write it."""
    return f"-step{step:08d}.safetensors"
