"""Convert: `python -m sdft.formats in=model.safetensors out=model to=folder`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from sdft.config.command import command
from sdft.errors import UserError
from sdft.formats.convert import convert
from sdft.models.load import CONFIGS, SDXL_BASE, SDXL_ID, find_folder


@command("formats")
def main(cfg: DictConfig) -> None:
    """Convert, and print the path of the result."""
    switches = ("allow_pickle", "overwrite", "skip_unknown")
    for key in switches:
        if not isinstance(cfg[key], bool):
            raise UserError(f"{key}={cfg[key]}: must be true or false")
    source = Path(str(cfg["in"])).expanduser()
    if not source.exists() and str(source) != "nano":
        raise UserError(f"in={cfg['in']}: there is no such file or folder")
    # Only a folder needs tokenizers; otherwise the shipped configs of SDXL, which give the shapes, are enough.
    incomplete = cfg.to == "folder" and not source.is_dir()
    config = SDXL_BASE if cfg.config == SDXL_ID and not incomplete else find_folder("config", cfg.config, CONFIGS)
    out = convert(str(cfg["in"]), str(cfg.out), cfg.to, config, cfg.dtype, *(cfg[key] for key in switches))
    print(f"{out}: {cfg['in']} as {cfg.to}")


if __name__ == "__main__":
    main()
