"""From a finished run to a model repository: its folder, and the upload."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sdft.board.outputs import choice_of
from sdft.errors import UserError
from sdft.formats.output import atomic_output
from sdft.formats.run_folder import SUMMARY
from sdft.publish.card import IMAGES, card, license_of, sentence
from sdft.publish.facts import Facts, pictures_of, read_facts
from sdft.publish.files import metadata_of, thumbnail, write_pictures, write_weights
from sdft.publish.hub import refuse_name, upload
from sdft.publish.secrets import refuse_secrets
from sdft.publish.usage import EMBEDDINGS

CARD = "README.md"
WRITTEN = re.compile(rf"{re.escape(CARD)}|\.gitattributes|{IMAGES}/|{EMBEDDINGS}/|.+\.safetensors")
"""Names in a published folder, beside those of a model."""


def publish(cfg: DictConfig, report: Callable[[str], Any]) -> Path:
    """Write the folder of the run `cfg.run`, and upload it to `cfg.to` if that is set; returns the folder.

    If `cfg.run` is such a folder, it is uploaded as it is.

    Raises UserError for a run that cannot be published, for a folder with secrets, and where the upload fails.
    """
    refuse_kinds(cfg)
    if cfg.to is not None:
        refuse_name(cfg.to)
    run = Path(cfg.run).expanduser()
    is_written = (run / CARD).is_file() and not (run / SUMMARY).is_file()
    folder = run if is_written else Path(cfg.out).expanduser()
    if is_written:
        refuse_secrets(folder)
    else:
        facts = read_facts(run, cfg.base, cfg.weights == "recommended")
        write_folder(facts, folder, cfg)
        report(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
        for line in notes(facts, cfg):
            report(line)
    if cfg.to is None:
        report(f"next: read {folder / CARD}, then python -m sdft.publish run={folder} to=USER/NAME")
    else:
        report(f"uploaded: {upload(folder, cfg.to, cfg.private)}")
    return folder


def refuse_kinds(cfg: Mapping[str, Any]) -> None:
    """Raise UserError for an option of the wrong kind."""
    for key in ("run", "out", "to", "license", "base", "author", "description"):
        if cfg[key] is not None and (not isinstance(cfg[key], str) or not cfg[key].strip()):
            raise UserError(f"{key}={cfg[key]}: must be a text")
    if cfg["weights"] not in ("final", "recommended"):
        raise UserError(f"weights={cfg['weights']}: must be final, those of the end of the run, or recommended")
    for key in ("private", "overwrite"):
        if not isinstance(cfg[key], bool):
            raise UserError(f"{key}={cfg[key]}: must be true or false")


def write_folder(facts: Facts, folder: Path, options: Mapping[str, Any]) -> None:
    """Write a folder as a model repository, whole or not at all. Raises UserError if it would hold a secret."""
    title = title_of(facts, options["to"])
    about = {
        "to": options["to"],
        "license": options["license"] or license_of(facts),
        "description": options["description"] or sentence(facts),
        "author": options["author"] or (options["to"] or "").partition("/")[0],
    }
    pictures, shown = pictures_of(facts)
    with atomic_output(folder, "out", options["overwrite"], others=WRITTEN) as written:
        written.mkdir()
        write_pictures(facts, pictures, written)
        write_weights(facts, title, written, metadata_of(facts, title, about, thumbnail(facts, pictures)))
        (written / CARD).write_text(card(facts, title, about, pictures, shown), encoding="utf-8")
        refuse_secrets(written, facts.config)


def title_of(facts: Facts, to: str | None) -> str:
    """The name of the repository, else that of the run, as part of file names."""
    name = to.partition("/")[2] if to else str(facts.summary.get("name") or facts.run.name)
    return re.sub(r"[^\w.-]", "_", name)


def notes(facts: Facts, options: Mapping[str, Any]) -> list[str]:
    """What the user should know before the upload."""
    found = []
    if facts.base is None and not facts.is_nano:
        found.append(f"  base: the run read {facts.base_name}; if it is on the Hub, name it with base=OWNER/NAME")
        if options["license"] is None:
            found.append("  license: openrail++ is that of SDXL; set license= if the base has another")
    if facts.chosen is None and (choice := choice_of(facts.run)) and choice["recommended"]:
        found.append("  weights: those of the end of the run; weights=recommended publishes those that were chosen")
    return found
