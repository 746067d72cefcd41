"""The table of docs/training.md: its options exist, and the names of other trainers are those that are translated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from sdft.config.command import check, compose
from sdft.errors import UserError
from sdft.training.translate import kohya, kohya_network, onetrainer

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
ROW = re.compile(r"^\| (`[^|]+) \| ([^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", re.MULTILINE)
ROWS = ROW.findall(PAGE.read_text(encoding="utf-8"))
ALONE = ("objective", "tuning", "data", "callbacks")
"""Groups whose options have keys of their own: their rows are composed by themselves."""


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def chosen_in(cell: str) -> dict[str, str]:
    return dict(item.split("=", 1) for item in names(cell) if "=" in item)


def fits(cell: str, batch: list[str]) -> bool:
    """Whether the choices of a row go with those of others."""
    keys, taken = set(chosen_in(cell)), {key for other in batch for key in chosen_in(other)}
    return not keys & taken and not (keys | taken) & set(ALONE)


def in_batches(cells: list[str]) -> list[list[str]]:
    """Rows that choose different things are composed together: a composition takes a second."""
    batches: list[list[str]] = []
    for cell in cells:
        fitting = (batch for batch in batches if fits(cell, batch))
        if (batch := next(fitting, None)) is not None:
            batch.append(cell)
        else:
            batches.append([cell])
    return batches


def missing(cells: list[str]) -> list[str]:
    """What is wrong with the options of these rows."""
    chosen = {key: value for cell in cells for key, value in chosen_in(cell).items()}
    chosen = {"model": "sdxl", "data": "folder"} | chosen
    if chosen["data"] in ("folder", "preference"):
        chosen["data.root"] = "/x"
    try:
        cfg = compose("train", [f"{key}={value}" for key, value in chosen.items()])
        check(cfg)
    except UserError as error:
        half = len(cells) // 2
        return missing(cells[:half]) + missing(cells[half:]) if half else [f"{cells[0]}: {error}"]
    keys = [name for cell in cells for name in names(cell) if "=" not in name]
    return [f"{key}: is no option" for key in keys if not has(cfg, key)]


def has(cfg: Any, key: str) -> bool:
    node = cfg
    for part in key.split("."):
        if part not in node:
            return False
        node = None if OmegaConf.is_missing(node, part) else node[part]
    return True


def test_the_page_has_its_table() -> None:
    assert len(ROWS) >= 80
    assert len({row[0] for row in ROWS}) == len(ROWS)


@pytest.mark.slow
def test_the_options_of_the_page_exist() -> None:
    batches = in_batches([row[0] for row in ROWS])
    assert len(batches) < 40
    assert [line for batch in batches for line in missing(batch)] == []


def test_a_wrong_option_of_the_page_would_be_seen() -> None:
    assert missing(["`objective/weighting=min_snr` `objective.weighting.gama`"]) == [
        "objective.weighting.gama: is no option"
    ]
    assert "no option" in missing(["`optimizer=adamx`", "`rank`"])[0]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_names_of_other_trainers_on_the_page_are_known(row: tuple[str, ...]) -> None:
    kohyas = {*kohya.TABLE.known, *kohya_network.NETWORK_ARGS}
    for known, cell in ((kohyas, row[1]), (onetrainer.TABLE.known, row[2])):
        for name in names(cell):
            key = name.partition("=")[0].lstrip("-")
            assert key in known, name
    assert row[4].strip()
    assert row[5].strip()
