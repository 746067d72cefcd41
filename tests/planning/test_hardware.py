"""The presets of cards: which one a GPU gets, what dry_run says, and that real SDXL fits by the forecast."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from checks import long, slow
from page_commands import write_pictures

import train
from sdft import hardware
from sdft.config.command import compose
from sdft.config.compose import with_found_hardware
from sdft.errors import UserError
from sdft.hardware import PRESETS, fitting_presets
from sdft.planning import dry_run as dry_run_module
from sdft.planning.dry_run import preset_that_fits

ROOT = Path(__file__).resolve().parents[2]
LARGER = [(11.6, "12gb"), (15.7, "16gb"), (23.5, "24gb"), (79.1, "80gb"), (139.8, "80gb")]
TASKS = ("style", "word", "product", "character", "brand")
IN_TIME = {("style", 6)}
TIGHT = {("word", 8), ("product", 8), ("word", 24)}
"""A forecast takes a minute of a busy core, so `make test-long` has the others."""


def test_there_is_an_option_for_each_card() -> None:
    names = {file.stem for file in (ROOT / "conf" / "hardware").glob("*.yaml")}
    assert names == {*PRESETS, "12gb_full", "24gb_full", "auto"}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_has_four_images_on_every_card(preset: str) -> None:
    cfg = compose("train", ["model=sdxl", "data=folder", "data.root=x", f"hardware={preset}"])
    assert cfg.data.batch_size * cfg.trainer.accumulate_grad_batches == 4


@pytest.mark.parametrize(
    ("memory", "preset"),
    [(6.0, "6gb"), (7.6, "8gb"), (8.0, "8gb"), *LARGER],
)
def test_a_card_gets_the_largest_preset_it_has_room_for(memory: float, preset: str, monkeypatch) -> None:
    assert fitting_presets(memory)[0] == preset
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = type("Card", (), {"total_memory": memory * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    assert with_found_hardware(["rank=4", "hardware=auto"]) == ["rank=4", f"hardware={preset}"]


def test_without_a_card_nothing_is_set_and_a_small_one_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert with_found_hardware(["hardware=auto"]) == ["hardware=auto"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Card", (), {"total_memory": 4 * 2**30}))
    with pytest.raises(UserError, match=r"hardware=auto: this GPU has 4\.0 GiB, and the smallest preset is for 6 GB"):
        with_found_hardware(["hardware=auto"])


def test_a_job_of_slurm_has_no_more_memory_than_its_control_group(tmp_path: Path, monkeypatch) -> None:
    names = "memory.max", "memory.current", "inactive_file"
    monkeypatch.setattr(hardware, "own_cgroups", lambda: [(tmp_path, "slurm/job", names)])
    (tmp_path / "slurm" / "job").mkdir(parents=True)
    for folder, limit in ((tmp_path / "slurm", str(3 * 2**30)), (tmp_path / "slurm" / "job", "max")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{2 * 2**30}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {2**29}\n")
    assert hardware.available_memory() == 1.5 * 2**30


def dry_run(monkeypatch, capsys, *words: str) -> tuple[int, str]:
    """Exit status of `train.py dry_run=true`, and what it printed."""
    monkeypatch.setattr(sys, "argv", ["train.py", "dry_run=true", "preflight.tflops=100", *words])
    status = 0
    try:
        train.main()
    except SystemExit as left:
        status = int(left.code or 0)
    return status, "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("task", "card"),
    [
        (task, card) if (task, card) in IN_TIME else slow(task, card) if (task, card) in TIGHT else long(task, card)
        for task in TASKS
        for card in (6, 8, 12, 24, 80)
        if card > 6 or task in ("style", "brand")
    ],
)
def test_the_real_sdxl_fits_on_the_card_by_the_forecast(task: str, card: int, tmp_path, monkeypatch, capsys) -> None:
    write_pictures(tmp_path / "pictures")
    words = [f"experiment={task}", "model=sdxl", "data=folder", f"data.root={tmp_path / 'pictures'}"]
    status, printed = dry_run(monkeypatch, capsys, *words, f"hardware={card}gb", f"preflight.memory={card}")
    assert status == 0, printed
    assert f"GiB of {card}.0, while" in printed
    assert "unet            2,6" in printed


@pytest.mark.slow
def test_words_do_not_fit_on_6_gb_and_the_next_card_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    write_pictures(tmp_path / "pictures")
    words = ["experiment=word", "model=sdxl", "data=folder", f"data.root={tmp_path / 'pictures'}"]
    status, printed = dry_run(monkeypatch, capsys, *words, "hardware=6gb", "preflight.memory=6")
    assert status == 2
    assert "GiB on each GPU and there are 6.0; the smallest card that it fits on has 8 GB" in printed


@pytest.mark.parametrize("card", [12, slow(24)])
def test_all_of_the_unet_can_be_tuned_on_12_gb_by_the_forecast(card: int, tmp_path, monkeypatch, capsys) -> None:
    """In bf16 with stochastic rounding, states of 8 bits and a fused backward pass."""
    write_pictures(tmp_path / "pictures")
    words = ["tuning=full", f"hardware={card}gb_full", "model=sdxl", "data=folder"]
    words.append(f"data.root={tmp_path / 'pictures'}")
    status, printed = dry_run(monkeypatch, capsys, *words, f"preflight.memory={card}", "preflight.host_memory=32")
    assert status == 0, printed
    assert "trains unet: 2,567,463,684 of" in printed
    assert "gradients" not in printed


@pytest.mark.slow
def test_adafactor_needs_less(tmp_path: Path, monkeypatch, capsys) -> None:
    write_pictures(tmp_path / "pictures")
    words = ["tuning=full", "model=sdxl", "data=folder", f"data.root={tmp_path / 'pictures'}", "hardware=12gb_full"]
    limits = ["optimizer=adafactor", "preflight.memory=9.5", "preflight.host_memory=32"]
    status, printed = dry_run(monkeypatch, capsys, *words, *limits)
    assert status == 0, printed


@pytest.mark.parametrize(
    ("memory", "fits", "said"),
    [
        (24.0, lambda cfg: True, "hardware=24gb fits"),
        (24.0, lambda cfg: cfg.model.offload_idle, "hardware=6gb fits"),
        (8.0, lambda cfg: cfg.preflight.memory >= 24, "the smallest card that it fits on has 24 GB (hardware=24gb)"),
        (24.0, lambda cfg: False, None),
    ],
)
def test_the_preset_that_fits_is_named(memory: float, fits, said: str | None, monkeypatch) -> None:
    def forecast(cfg, look_for_preset: bool) -> None:
        assert not look_for_preset
        if not fits(cfg):
            raise UserError("too large")

    monkeypatch.setattr(dry_run_module, "forecast", forecast)
    cfg = compose("train", ["model=sdxl", "data=folder", "data.root=x"])
    assert preset_that_fits(cfg, memory) == said


def test_too_little_memory_of_the_machine_is_refused_in_time(tmp_path: Path, monkeypatch, capsys) -> None:
    words = ["experiment=dreamy_style", "preflight.host_memory=0.5"]
    status, printed = dry_run(monkeypatch, capsys, *words)
    assert status == 2
    assert "GiB of the machine's memory and there are 0.5; close other programs" in printed
