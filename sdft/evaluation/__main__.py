"""Compare what models draw of the same words: `python eval.py subjects='{base: nano, mine: RUN_FOLDER}'`."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sdft.config.command import command
from sdft.distributed.processes import ProcessInfo
from sdft.distributed.run_lock import run_lock
from sdft.errors import UserError
from sdft.evaluation.run import compare


@command("eval")
def main(cfg: DictConfig) -> None:
    """One comparison, from config to images, metrics and `report.html`."""
    hydra = HydraConfig.get()
    if ProcessInfo.current().world_size > 1 and not any(word.startswith("run_dir=") for word in hydra.overrides.task):
        raise UserError("run_dir is not set: several processes draw one comparison, so pass run_dir=FOLDER to all")
    cfg.run_dir = hydra.runtime.output_dir
    with run_lock(Path(cfg.run_dir)):
        compare(cfg, print)


if __name__ == "__main__":
    main()
