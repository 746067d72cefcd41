"""A logger for TensorBoard whose curves a resumed run continues."""

from __future__ import annotations

import importlib.util
import json
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from sdft.errors import UserError


class TensorBoard(TensorBoardLogger):
    """Event files in `tensorboard/` of a run folder: `tensorboard --logdir runs` shows the runs below it.

    With the first value or image that a process logs, it marks what others logged in this folder from that step on as
    dropped, since a run that is resumed repeats the steps after its checkpoint.

    save_dir: the run folder.

    Raises UserError if the package tensorboard is not installed.
    """

    def __init__(self, save_dir: str | None):
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                "logger=tensorboard: the package tensorboard is not installed; pip install 'sdft[tensorboard]', or "
                "set logger=csv"
            )
        super().__init__(Path(save_dir or "."), name="tensorboard", version="", default_hp_metric=False)
        self.config: dict[str, Any] = {}
        self._begun = False

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """The config, which is written as a text with the first value."""
        self.config = dict(params if isinstance(params, dict) else vars(params))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._begin(step or 0)
        # A run has no epochs here, and Lightning logs them beside every value.
        super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[str], step: int | None = None) -> None:
        """Image files, by the signature of Lightning's logger for W&B."""
        self._begin(step or 0)
        for path in images:
            with Image.open(path) as image:
                self.experiment.add_image(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    @rank_zero_only
    def finish(self, summary: Mapping[str, Any], step: int = 0) -> None:
        """Log the metrics of a finished run beside its config, for the page HPARAMS, and close the files."""
        metrics = {f"summary/{name}": value for name, value in summary.items() if isinstance(value, int | float)}
        if metrics:
            self._begin(step)
            super().log_hyperparams(self.config, metrics, step)
        self.finalize("finished")

    @rank_zero_only
    def save(self) -> None:
        """Write what is logged; without Lightning's hparams.yaml, which a resumed run would not update."""
        if self._experiment is not None:
            self.experiment.flush()

    def _begin(self, step: int) -> None:
        if self._begun:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._begun = True
        started = Event(step=step, session_log=SessionLog(status=SessionLog.START))
        self.experiment.file_writer.add_event(started)  # Lightning opens the file before the step is known.
        text = json.dumps(self.config, indent=2, ensure_ascii=False, default=str)
        self.experiment.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), step)
